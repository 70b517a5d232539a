"""kvpack's own reading and writing of safetensors files, held against the package in both directions."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from newer import only

from kvpack.errors import FormatError, KvpackError
from kvpack.formats.safetensors import ITEM_BITS, TensorFile, build_header, item_bytes
from kvpack.formats.source import Capture

NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64,
    "C64": np.complex64,
}  # fmt: skip
TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "C64": torch.complex64,
}

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
metadata = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.text(max_size=8).map(lambda text: text.encode(errors="replace").decode()),
    max_size=3,
)


def tensors_of(dtypes: Any) -> st.SearchStrategy[dict[str, tuple[str, tuple[int, ...]]]]:
    return st.dictionaries(names, st.tuples(st.sampled_from(sorted(dtypes)), shapes), max_size=4)


def random_bytes(dtype: str, shape: tuple[int, ...]) -> bytes:
    """As many bytes as such a tensor takes. Those of booleans are 0 and 1."""
    size = math.prod(shape) * ITEM_BITS[dtype] // 8
    return np.random.default_rng(size).integers(0, 2 if dtype == "BOOL" else 256, size, np.uint8).tobytes()


def opened(data: bytes) -> TensorFile:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return TensorFile.open(Path(file.name))


# The package is given None for no metadata: of an empty map it makes a broken header where there is no tensor.


def assert_reads(data: bytes, expected: dict[str, tuple[str, tuple[int, ...]]], given_metadata: dict[str, str]) -> None:
    """kvpack finds the tensors in the bytes, with their dtypes, shapes and contents, and the metadata."""
    file = opened(data)
    assert file.metadata == given_metadata
    assert {spec.name: (spec.dtype, spec.declared_shape) for spec in file.header.tensors} == expected
    for spec in file.header.tensors:
        assert bytes(file.data(spec)) == random_bytes(spec.dtype, spec.declared_shape)
        bits = Capture(file).read(spec.name)
        assert (bits.shape, bits.itemsize) == (spec.shape, item_bytes(spec.dtype))
        assert bits.tobytes() == bytes(file.data(spec))


@settings(max_examples=60)
@given(tensors_of(NUMPY), metadata)
def test_kvpack_reads_what_the_package_writes_from_numpy(
    tensors: dict[str, tuple[str, tuple[int, ...]]], given_metadata: dict[str, str]
) -> None:
    arrays = {n: np.frombuffer(random_bytes(d, s), NUMPY[d]).reshape(s) for n, (d, s) in tensors.items()}
    assert_reads(safetensors.numpy.save(arrays, given_metadata or None), tensors, given_metadata)


@settings(max_examples=60)
@given(tensors_of(TORCH), metadata)
def test_kvpack_reads_what_the_package_writes_from_torch(
    tensors: dict[str, tuple[str, tuple[int, ...]]], given_metadata: dict[str, str]
) -> None:
    arrays = {
        n: torch.frombuffer(bytearray(random_bytes(d, s)), dtype=TORCH[d]).reshape(s)
        if math.prod(s)
        else torch.empty(s, dtype=TORCH[d])
        for n, (d, s) in tensors.items()
    }
    assert_reads(safetensors.torch.save(arrays, given_metadata or None), tensors, given_metadata)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_kvpack_reads_the_packages_four_bit_tensors() -> None:
    """torch packs two elements into one of its own; the package writes the shape in elements of 4 bits."""
    packed = torch.from_numpy(np.arange(12, dtype=np.uint8).reshape(3, 4)).view(torch.float4_e2m1fn_x2)
    file = opened(safetensors.torch.save({"x": packed}))
    (spec,) = file.header.tensors
    assert (spec.dtype, spec.declared_shape, spec.shape) == ("F4", (3, 8), (12,))
    assert bytes(file.data(spec)) == bytes(range(12))


@settings(max_examples=100)
@given(tensors_of(ITEM_BITS), metadata)
def test_the_package_reads_what_kvpack_writes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], given_metadata: dict[str, str]
) -> None:
    whole = {n: (d, s) for n, (d, s) in tensors.items() if math.prod(s) * ITEM_BITS[d] % 8 == 0}
    header = build_header([(n, d, s) for n, (d, s) in whole.items()], given_metadata)
    data = len(header.raw).to_bytes(8, "little") + header.raw + b"".join(random_bytes(d, s) for d, s in whole.values())
    found = {n: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for n, e in safetensors.deserialize(data)}
    assert found == {n: (d, s, random_bytes(d, s)) for n, (d, s) in whole.items()}
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with safetensors.safe_open(file.name, "np") as theirs:
            assert (theirs.metadata() or {}) == given_metadata


GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]},
}


def whole(header: Any, data: bytes = bytes(29)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


MALFORMED = {
    "nothing": b"",
    "no header": bytes(8),
    "a header that ends early": whole(GOOD)[:40],
    "a header that is too long": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": whole(b"{nothing}"),
    "no object": whole(b"[1, 2]"),
    "no UTF-8": whole(b'{"\xff":1}'),
    "metadata that are no strings": whole({**GOOD, "__metadata__": {"a": 1}}),
    "metadata that are no object": whole({**GOOD, "__metadata__": "a"}),
    "an entry that is no object": whole({**GOOD, "a": [1]}),
    "a missing dtype": whole({**GOOD, "a": {"shape": [2, 3], "data_offsets": [0, 24]}}),
    "a missing shape": whole({**GOOD, "a": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "missing offsets": whole({**GOOD, "a": {"dtype": "F32", "shape": [2, 3]}}),
    "an unknown dtype": whole(changed("a", dtype="F33")),
    "a dtype that is no string": whole(changed("a", dtype=[1])),
    "a negative axis": whole(changed("a", shape=[-2, -3])),
    "an axis that is no whole number": whole(changed("a", shape=[2, 3.0])),
    "an axis of too many digits": whole(json.dumps(GOOD).replace("5]", "5" * 5000 + "]").encode()),
    "a shape that is too large": whole(changed("a", shape=[2, 4])),
    "a shape that overflows": whole(changed("a", shape=[1 << 40, 1 << 40])),
    "three offsets": whole(changed("a", data_offsets=[0, 24, 24])),
    "offsets in the wrong order": whole(changed("a", data_offsets=[24, 0])),
    "a gap": whole(changed("b", data_offsets=[25, 30]), bytes(30)),
    "a gap at the start": whole({"b": {**GOOD["b"], "data_offsets": [1, 6]}}, bytes(6)),
    "an overlap": whole(changed("b", data_offsets=[23, 28]), bytes(28)),
    "data that end early": whole(GOOD, bytes(28)),
    "data after the last tensor": whole(GOOD, bytes(30)),
    "half a byte": only("F4", (3,), bytes(2)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_by_both(name: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(MALFORMED[name])
    with pytest.raises(KvpackError):
        opened(MALFORMED[name])


def test_the_file_that_they_are_made_from_is_sound() -> None:
    assert len(safetensors.deserialize(whole(GOOD))) == len(opened(whole(GOOD)).tensors) == 2


@settings(max_examples=300)
@given(st.data())
def test_what_the_package_refuses_kvpack_refuses(data: st.DataObject) -> None:
    """Any one byte of a sound header is changed. What the package then accepts kvpack reads alike, or refuses."""
    raw = bytearray(whole(GOOD))
    raw[data.draw(st.integers(0, len(raw) - 30))] = data.draw(st.integers(0, 255))
    try:
        theirs = {n: (e["dtype"], tuple(e["shape"]), bytes(e["data"])) for n, e in safetensors.deserialize(bytes(raw))}
    except safetensors.SafetensorError:
        with pytest.raises(KvpackError):
            opened(bytes(raw))
        return
    try:
        file = opened(bytes(raw))
    except KvpackError:
        return
    assert {s.name: (s.dtype, s.declared_shape, bytes(file.data(s))) for s in file.header.tensors} == theirs


def test_a_header_that_does_not_begin_with_a_brace_is_refused() -> None:
    """The format demands the brace; the package is more lenient."""
    with pytest.raises(FormatError, match="not a safetensors file"):
        opened(whole(b" " + json.dumps(GOOD).encode()))


def test_building_a_header_of_half_bytes_is_refused() -> None:
    with pytest.raises(FormatError):
        build_header([("x", "F4", (3,))], {})
