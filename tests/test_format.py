"""The format by a second decoder and by files of the past; the specification names every stage."""

from __future__ import annotations

import ast
import hashlib
import io
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import reference_decoder
import reference_stages
from conftest import FIXTURES, SMALL, one_of_each_family, write_tensors
from profiles import PROFILED, STACKED, TINY, profile_for, tiny_capture

from kvpack import jobs
from kvpack.codecs.chain.registry import STAGES
from kvpack.codecs.recipes import CODECS, family_of
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container
from kvpack.numerics.floats import UINT, from_float32, to_float32
from kvpack.profiles import Profile

GOLDENS = FIXTURES / "goldens" / "1.0"
SPECIFICATION = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
FLOAT_PRODUCTS = [name for name in CODECS if name.startswith(("turboquant", "kvtc", "aquakv", "fisher", "local"))]


def decompress(data: bytes, profile: Profile | None = None) -> bytes:
    sink = io.BytesIO()
    jobs.decompress(KvpFile(Container(memoryview(data)), profile), sink)
    return sink.getvalue()


def compress(path: Path, name: str, profile: Profile | None = None, **options: int) -> bytes:
    sink = io.BytesIO()
    jobs.compress(path, sink, CODECS[name], profile=profile, **options)
    return sink.getvalue()


def golden_profile(name: str) -> Profile | None:
    return Profile.open(TINY) if name in PROFILED else None


def refer(data: bytes, profile: Profile | None) -> bytes:
    """What the reference decoder gives; it reads the profile's bytes itself."""
    return reference_decoder.decode(data, profile.path.read_bytes() if profile else b"")


def assert_same(name: str, ours: bytes, theirs: bytes) -> None:
    """The same bytes; where matrix products of floats stand behind, one unit in the last place of bf16."""
    if name not in FLOAT_PRODUCTS:
        assert ours == theirs
        return
    start = 8 + int.from_bytes(ours[:8], "little")
    assert ours[:start] == theirs[:start]
    x, y = (np.frombuffer(data[start:], np.uint16).astype(np.int64) for data in (ours, theirs))
    x, y = (np.where(bits < 0x8000, bits, 0x8000 - bits) for bits in (x, y))  # in the order of the numbers
    assert np.abs(x - y).max() <= 1


@pytest.mark.parametrize("name", CODECS)
def test_goldens_decode_alike_by_both_decoders(name: str) -> None:
    data = (GOLDENS / f"{name}.kvp").read_bytes()
    profile = golden_profile(name)
    ours = decompress(data, profile)
    assert_same(name, ours, refer(data, profile))
    if CODECS[name].lossless:
        digest = (GOLDENS / f"{name}.sha256").read_text().strip()
        assert hashlib.sha256(ours).hexdigest() == digest
        assert ours == SMALL.read_bytes()


def test_goldens_never_change() -> None:
    """Those of 1.0, and the profile that some need: files that people have keep their meaning."""
    folder = GOLDENS
    sums = dict(reversed(line.split()) for line in (folder / "SHA256SUMS").read_text().splitlines())
    files = {path.name: path for path in (TINY, *folder.glob("*.kvp"), *folder.glob("*.sha256"))}
    assert files.keys() == sums.keys()
    for name, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sums[name], name


@pytest.mark.parametrize("name", FLOAT_PRODUCTS)
def test_goldens_of_float_products_are_of_the_size_written_today(tmp_path: Path, name: str) -> None:
    """Where a matrix product rounds across a boundary a code may differ, on another machine."""
    path = tiny_capture(tmp_path / "tiny") if name in PROFILED else SMALL
    golden, today = Container.open(GOLDENS / f"{name}.kvp"), compress(path, name, golden_profile(name))
    assert golden.header == Container(memoryview(today)).header
    assert len(today) == pytest.approx(golden.size, rel=0.01)


@pytest.mark.parametrize("name", [name for name in CODECS if name not in FLOAT_PRODUCTS])
def test_goldens_are_what_is_written_today(name: str) -> None:
    """The streams of rANS and bit packing are the same bytes everywhere; zlib's and zstd's may change."""
    golden, today = Container.open(GOLDENS / f"{name}.kvp"), Container(memoryview(compress(SMALL, name)))
    assert golden.header == today.header
    for old, new in zip(golden.parts, today.parts, strict=True):
        assert (old.spec, old.codec, old.digest) == (new.spec, new.codec, new.digest)
        if golden.header.codecs[old.codec]["name"] != "zstd":
            assert golden.part(old).streams == today.part(new).streams


@pytest.mark.parametrize("name", one_of_each_family(STACKED))
@pytest.mark.parametrize("dtype", UINT)
def test_awkward_stacks_decode_alike(tmp_path: Path, name: str, dtype: str) -> None:
    """Three layers out of order, odd dimensions, several chunks, one of them carried; tensors of no layer."""
    rng = np.random.default_rng(0)
    tensors: dict[str, tuple[str, np.ndarray]] = {"scalar": ("F32", np.array(0.5, np.float32))}
    for i in (10, 9, 2):
        for kind in ("values", "keys"):
            values = rng.standard_normal((2, 300, 7)).astype(np.float32)
            values[:, 130, 3] = np.inf
            tensors[f"layers.{i}.{kind}"] = (dtype, from_float32(values, dtype))
    path = write_tensors(tmp_path / "x", tensors, {"a": "ü"})
    profile = profile_for(path, CODECS[name])
    data = compress(path, name, profile, chunk_tokens=128)
    ours, theirs = decompress(data, profile), refer(data, profile)
    start = 8 + int.from_bytes(ours[:8], "little")
    assert ours[: start + 4] == theirs[: start + 4]
    x, y = (to_float32(np.frombuffer(b[start + 4 :], UINT[dtype]), dtype) for b in (ours, theirs))
    assert (np.isfinite(x) == np.isfinite(y)).all()
    near = {"BF16": 2**-7, "F16": 2**-10, "F32": 2**-18}[dtype]  # one unit in the last place
    assert np.allclose(x, y, rtol=near, atol=1e-5)


@pytest.mark.parametrize("name", one_of_each_family(name for name in CODECS if name not in STACKED))
@pytest.mark.parametrize("dtype", UINT)
def test_awkward_captures_decode_alike(tmp_path: Path, name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    unsigned = UINT[dtype]
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for i, shape in enumerate([(1, 1, 1), (2, 300, 7), (3, 0, 4), (2, 63, 8)]):
        for kind in ("keys", "values"):
            bits = rng.integers(0, 1 << (8 * unsigned(0).itemsize), shape).astype(unsigned)
            bits[:, ::128, 0] = np.iinfo(unsigned).max  # a NaN in every part: carried losslessly by all codecs
            tensors[f"layers.{i}.{kind}"] = (dtype, bits)
    tensors |= {
        "tokens": ("I32", rng.integers(0, 9999, 300).astype(np.int32)),
        "scalar": ("F32", np.array(0.5, np.float32)),
        "odd": ("U8", rng.integers(0, 256, (3, 5, 2, 7)).astype(np.uint8)),
    }
    path = write_tensors(tmp_path / "x", tensors, {"a": "ü"})
    data = compress(path, name, chunk_tokens=128)
    assert reference_decoder.decode(data) == decompress(data) == path.read_bytes()


def test_the_reference_decoder_notices_damage() -> None:
    data = bytearray((GOLDENS / "lossless.kvp").read_bytes())
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        reference_decoder.decode(bytes(data))


@pytest.mark.parametrize("module", [reference_decoder, reference_stages], ids=lambda m: m.__name__)
def test_the_reference_decoder_stands_alone(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any(name.startswith("kvpack") for name in names)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_specified(stage: str) -> None:
    assert f"\n### `{stage}`" in SPECIFICATION


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_in_a_golden(stage: str) -> None:
    used = set()
    for name in CODECS:
        for codec in Container.open(GOLDENS / f"{name}.kvp").header.codecs:
            used.update(s["name"] for chain in (codec["keys"], codec["values"]) for s in chain)
    assert stage in used or stage == "bitpack"  # rans packs by bitpack's rule; no codec ends in it alone


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_is_specified(name: str) -> None:
    assert f"`{family_of(name)}" in SPECIFICATION.split("## Codecs")[1]
