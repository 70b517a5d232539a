"""The codec ``replay``: residuals, token coders, samples, identity, and machines that compute otherwise."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import made_model
import numpy as np
import pytest
import reference_decoder
import reference_replay
import torch
import transformers as t
from conftest import FIXTURES, Result
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from made_model import MadeModel, write_made
from models import CONFIGS, LLAMA, save_model

from kvpack import jobs
from kvpack.capture import CaptureOptions, Model, ReplayModel, load_model, run, write_capture
from kvpack.capture.replay import TokenSteps
from kvpack.codecs.model import Cache, Replay
from kvpack.codecs.recipes import codec_named
from kvpack.codecs.replay import ReplayCodec, residual, tokens
from kvpack.codecs.replay.sample import SIZE, Sample, positions
from kvpack.errors import CorruptError, FormatError, MismatchError
from kvpack.formats.safetensors import build_header, parse_header
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container
from kvpack.kvp.compact import compact, expand
from kvpack.numerics.floats import from_float32, to_float32

Cli = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again, and again. " * 4
OPTIONS = CaptureOptions(max_tokens=150, queries=4, chunk=100, generate=20, continuation=8)


# ---- Parts without a model -----------------------------------------------------------------------------------------

PATTERNS = st.sampled_from([np.uint16, np.uint32]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6)).flatmap(
        lambda first: st.tuples(st.just(first), hnp.arrays(dtype, first.shape))
    )
)


@given(PATTERNS)
def test_any_bits_come_back_whatever_the_model_computes(pair: tuple[np.ndarray, np.ndarray]) -> None:
    bits, expected = pair
    codes = residual.residual(bits, expected)
    streams = residual.encode(codes)
    found = residual.decode({name: memoryview(data) for name, data in streams}, bits.shape, bits.itemsize)
    assert np.array_equal(found, codes)
    assert np.array_equal(residual.restore(found, expected), bits)
    assert bool(streams) == (not np.array_equal(bits, expected))


@given(PATTERNS)
def test_both_decoders_read_residuals_alike(pair: tuple[np.ndarray, np.ndarray]) -> None:
    bits, expected = pair
    streams = dict(residual.encode(residual.residual(bits, expected)))
    part = {"shape": bits.shape, "tensor": {"dtype": "BF16" if bits.itemsize == 2 else "F32"}}
    assert np.array_equal(reference_replay.residual(streams, part, expected), bits)


def test_neighbouring_floats_differ_by_one() -> None:
    values = np.array([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0], np.float32)
    bits = from_float32(values, "BF16").reshape(1, -1, 1)
    above = np.where(bits & 0x8000, bits - 1, bits + 1).astype(np.uint16)
    above[0, 2] = 0  # after -0 comes +0
    assert residual.residual(above, bits).reshape(-1).tolist() == [2] * 6
    assert residual.residual(bits, above).reshape(-1).tolist() == [1] * 6


def test_damaged_residuals_are_refused() -> None:
    bits = np.arange(60, dtype=np.uint16).reshape(2, 5, 6) * 77
    streams = {n: memoryview(d) for n, d in residual.encode(residual.residual(bits, np.zeros_like(bits)))}
    assert set(streams) == {residual.SYMBOLS, residual.RAW}
    for broken in (
        {residual.SYMBOLS: streams[residual.SYMBOLS]},
        {**streams, residual.RAW: memoryview(bytes(streams[residual.RAW]) + b"\0")},
        {residual.RAW: streams[residual.RAW]},
        {**streams, "more": memoryview(b"")},
    ):
        with pytest.raises(CorruptError):
            residual.decode(broken, bits.shape, 2)


IDS = hnp.arrays(np.int32, st.integers(1, 60), elements=st.integers(0, MadeModel.vocabulary - 1))


@given(IDS, st.integers(1, 80))
def test_tokens_come_back_by_the_model(ids: np.ndarray, chunk: int) -> None:
    data = tokens.encode(ids, chunk, MadeModel(), MadeModel.vocabulary)
    model = MadeModel()
    assert np.array_equal(tokens.decode(memoryview(data), len(ids), chunk, model), ids)
    assert model.read == ids[:-1].tolist()  # in order, one by one, and no more than needed
    assert np.array_equal(reference_replay.token_ids(data, len(ids), chunk, made_model.computed()), ids)


@given(hnp.arrays(np.int32, st.integers(1, 60)), st.integers(1, 80))
def test_any_tokens_come_back_without_a_model(ids: np.ndarray, chunk: int) -> None:
    data = tokens.encode(ids, chunk, None)
    assert np.array_equal(tokens.decode(memoryview(data), len(ids), chunk, None), ids)
    assert np.array_equal(reference_replay.token_ids(data, len(ids), chunk, None), ids)


@given(IDS, st.integers(2, 12), st.integers(1, 200), st.integers(1, 30))
def test_a_drift_while_encoding_makes_chunks_fall_back(ids: np.ndarray, chunk: int, first: int, count: int) -> None:
    encoder = MadeModel(lambda call: first <= call < first + count)
    data = tokens.encode(ids, chunk, encoder, MadeModel.vocabulary)
    assert np.array_equal(tokens.decode(memoryview(data), len(ids), chunk, MadeModel()), ids)


def test_a_drift_while_decoding_is_noticed() -> None:
    ids = np.random.default_rng(0).integers(0, MadeModel.vocabulary, 40).astype(np.int32)
    data = tokens.encode(ids, 10, MadeModel(), MadeModel.vocabulary)
    ways = [way for _, _, way, _, _ in tokens._chunks(memoryview(data), 40, 10)]
    assert ways == [tokens.MODEL] * 4
    for first in (1, 15, 39):
        with pytest.raises(MismatchError, match="predictions"):
            tokens.decode(memoryview(data), 40, 10, MadeModel(lambda call, first=first: call >= first))
    with pytest.raises(MismatchError, match="--model"):
        tokens.decode(memoryview(data), 40, 10, None)


def test_a_drift_falls_back_for_its_own_chunk_alone() -> None:
    ids = np.random.default_rng(0).integers(0, MadeModel.vocabulary, 40).astype(np.int32)
    data = tokens.encode(ids, 10, MadeModel(lambda call: call == 25), MadeModel.vocabulary)
    ways = [way for _, _, way, _, _ in tokens._chunks(memoryview(data), 40, 10)]
    assert ways.count(tokens.FAST) == 1


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_damaged_token_streams_are_refused(cut: int) -> None:
    ids = np.arange(40, dtype=np.int32)
    data = tokens.encode(ids, 16, None)
    with pytest.raises(CorruptError):
        tokens.decode(memoryview(data[: len(data) - 1 - cut]), 40, 16, None)
    with pytest.raises(CorruptError):
        tokens.decode(memoryview(data + bytes(cut + 1)), 40, 16, None)


def test_an_integer_that_is_too_long_is_refused() -> None:
    payload = bytes(8 * 4 + 1)
    data = struct.pack("<BII", tokens.MODEL, len(payload), 0) + payload
    with pytest.raises(CorruptError, match="size"):
        tokens.decode(memoryview(data), 4, 4, MadeModel())


def test_frequencies_are_what_the_specification_says() -> None:
    assert tokens.FREQUENCIES[0] == 1 << 24
    assert tokens.FREQUENCIES[-1] == 1
    assert (np.diff(tokens.FREQUENCIES) <= 0).all()
    exact = 2.0**24 * np.exp(-np.arange(len(tokens.FREQUENCIES)) / 64)
    assert np.abs(tokens.FREQUENCIES[:-1] - exact[:-1]).max() <= 2
    odd = np.array([1, np.nan, -np.inf, 1 - 1 / 64, 0], np.float32)
    assert tokens.frequencies(odd).tolist()[1:3] == [1, 1]
    assert tokens.frequencies(odd)[3] == tokens.FREQUENCIES[1]


@given(st.integers(1, 1 << 40))
def test_sample_positions_ascend_within_the_cache(count: int) -> None:
    found = positions(count)
    assert found == sorted(set(found))
    assert len(found) == min(count, SIZE)
    assert found[0] >= 0
    assert found[-1] < count


def test_samples_tell_how_much_differs() -> None:
    one = Sample(tuple(range(64)))
    other = Sample((*range(48), *range(100, 116)))
    assert one.differing(other) == 0.25
    assert one.differing(Sample((1, 2))) == 1
    assert Sample.from_hex(one.to_hex()) == one
    for text in ("0", "00000", "zzzz", "00" * 130, 7, None):
        with pytest.raises(FormatError):
            Sample.from_hex(text)


NAMES = st.one_of(
    st.text(max_size=8), st.builds("layers.{}.{}".format, st.integers(0, 5), st.sampled_from(["keys", "values"]))
)


@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(["BF16", "I32"]), st.lists(st.integers(0, 9), max_size=3)),
        max_size=12,
        unique_by=lambda entry: entry[0],
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=3),
)
def test_compact_headers_give_the_same_bytes(entries: list[Any], metadata: dict[str, str]) -> None:
    header = build_header([e for e in entries if e[0] != "__metadata__"], metadata)
    document = compact(header)
    if document is not None:
        document = json.loads(json.dumps(document))
        assert expand(document).encode() == header.raw
        assert reference_replay.verbatim(document) == header.raw
    else:
        assert any("*" in name for name, _, _ in entries)


def test_layers_alike_are_one_run() -> None:
    names = [f"layers.{i}.{kind}" for i in range(40) for kind in ("keys", "values")]
    header = build_header([*((name, "BF16", (3, 9, 4)) for name in names), ("tokens", "I32", (9,))], {"a": "b"})
    document = compact(header)
    assert document is not None
    assert document["tensors"] == [
        [40, ("layers.*.keys", "BF16", (3, 9, 4)), ("layers.*.values", "BF16", (3, 9, 4))],
        ("tokens", "I32", (9,)),
    ]


def test_a_header_that_is_written_otherwise_stays_verbatim() -> None:
    assert compact(parse_header(b'{"x": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')) is None


@pytest.mark.parametrize(
    "document",
    [
        None,
        {"metadata": {}},
        {"metadata": {"a": 1}, "tensors": []},
        {"metadata": {}, "tensors": {}},
        {"metadata": {}, "tensors": [[]]},
        {"metadata": {}, "tensors": [["a", "BF16"]]},
        {"metadata": {}, "tensors": [["a", "BF17", [1]]]},
        {"metadata": {}, "tensors": [["a", "U8", [-1]]]},
        {"metadata": {}, "tensors": [["a", "U8", [1]], ["a", "U8", [1]]]},
        {"metadata": {}, "tensors": [[2, ["a", "U8", [1]]]]},
        {"metadata": {}, "tensors": [[1 << 40, ["a*", "U8", [1]]]]},
        {"metadata": {}, "tensors": [[True, ["a*", "U8", [1]]]]},
        {"metadata": {}, "tensors": [[0, ["a*", "U8", [1]]]]},
        {"metadata": {}, "tensors": [[1 << 13, *[[f"{i}*", "U8", [1]] for i in range(9)]]]},
        {"metadata": {}, "tensors": [["a" * 2000, "U8", [1]]]},
        {"metadata": {"\ud800": ""}, "tensors": []},
    ],
)
def test_malformed_compact_headers_are_refused(document: Any) -> None:
    with pytest.raises(FormatError):
        expand(document)


# ---- Golden files ---------------------------------------------------------------------------------------------------

GOLDEN = FIXTURES / "goldens" / "1.1"


@pytest.mark.parametrize("coder", ["fast", "model"])
def test_goldens_decode_alike_by_both_decoders(tmp_path: Path, coder: str) -> None:
    data = (GOLDEN / f"replay-{coder}.kvp").read_bytes()
    ours = decompress(opened(data, MadeModel()))
    assert ours == reference_decoder.decode(data, b"", made_model.computed()) == write_made(tmp_path / "x").read_bytes()
    assert hashlib.sha256(ours).hexdigest() == (GOLDEN / f"replay-{coder}.sha256").read_text().strip()
    container = Container(memoryview(data))
    assert (container.version, container.critical) == ((1, 1), 0b1010)
    streams = [len(part.streams) for part in container.parts]
    assert streams == [0, 1, 2, 0, 2, 2, 1, 2]


@pytest.mark.parametrize("coder", ["fast", "model"])
def test_goldens_are_what_is_written_today(tmp_path: Path, coder: str) -> None:
    """Only zstd's frames may change."""
    golden = Container.open(GOLDEN / f"replay-{coder}.kvp")
    today = Container(memoryview(compress(write_made(tmp_path / "x"), MadeModel(), coder)))
    assert golden.header == today.header
    for old, new in zip(golden.parts, today.parts, strict=True):
        assert (old.spec, old.codec, old.digest) == (new.spec, new.codec, new.digest)
        if coder == "model" or old.spec.tensor.name != "tokens":
            assert golden.part(old).streams == today.part(new).streams


# ---- With tiny models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama-gqa"](), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Model:
    return load_model(str(folder), "bf16", "cpu")


@pytest.fixture(scope="module")
def captured(loaded: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_capture(loaded, tmp_path_factory.mktemp("capture") / "a.safetensors")


def save_capture(model: Model, path: Path, options: CaptureOptions = OPTIONS) -> Path:
    with path.open("wb") as sink:
        write_capture(run(model, TEXT, options), sink)
    return path


def changed(path: Path, target: Path, tensor: str, change: Callable[[np.ndarray], None], **metadata: object) -> Path:
    """A copy of a capture in which one tensor's bits, or some of the metadata, are others."""
    capture = Capture.open(path)
    known = {**capture.metadata, **{name: json.dumps(value) for name, value in metadata.items()}}
    entries = [(e.name, e.dtype, e.declared_shape) for e in capture.file.header.tensors]
    arrays = {name: np.array(capture.read(name)) for name, _, _ in entries}
    change(arrays[tensor])
    header = build_header(entries, {name: value for name, value in known.items() if value != "null"})
    body = b"".join(arrays[name].tobytes() for name, _, _ in entries)
    target.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + body)
    return target


def unchanged(_: np.ndarray) -> None:
    """Change nothing."""


def compress(path: Path, model: Any, coder: str = "fast", **options: Any) -> bytes:
    codec = codec_named("replay")
    assert isinstance(codec, ReplayCodec)
    sink = io.BytesIO()
    jobs.compress(path, sink, codec.with_token_coder(coder), model=model, **options)
    return sink.getvalue()


def opened(data: bytes, model: Any, **options: Any) -> KvpFile:
    return KvpFile(Container(memoryview(data)), model=model, **options)


def decompress(file: KvpFile) -> bytes:
    sink = io.BytesIO()
    jobs.decompress(file, sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_comes_back_without_residual_streams(name: str, tmp_path: Path) -> None:
    model = load_model(str(save_model(CONFIGS[name](), tmp_path / "model")), "bf16", "cpu")
    path = save_capture(model, tmp_path / "a.safetensors")
    data = compress(path, ReplayModel(model))
    container = Container(memoryview(data))
    assert not any(part.streams for part in container.parts if part.spec.tensor.layer is not None)
    assert decompress(opened(data, ReplayModel(model))) == path.read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("coder", ["fast", "model"])
def test_every_dtype_and_coder(folder: Path, tmp_path: Path, dtype: str, coder: str) -> None:
    model = load_model(str(folder), dtype, "cpu")
    path = save_capture(model, tmp_path / "a.safetensors")
    data = compress(path, ReplayModel(model), coder)
    assert decompress(opened(data, ReplayModel(model))) == path.read_bytes()


@pytest.mark.parametrize("drift", [False, True])
def test_chunks_of_tokens_by_a_real_model(
    loaded: Model, captured: Path, monkeypatch: pytest.MonkeyPatch, drift: bool
) -> None:
    """The encoder goes back to each chunk's start, to decode it; a chunk that does not decode is coded otherwise."""
    monkeypatch.setattr("kvpack.codecs.replay.codec.PREDICTED", 32)
    exact = TokenSteps.logits
    calls = 0

    def drifting(self: TokenSteps, token: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return np.asarray(exact(self, token) + (calls == 100) * np.arange(256, dtype=np.float32))

    with monkeypatch.context() as only_here:
        if drift:
            only_here.setattr(TokenSteps, "logits", drifting)
        data = compress(captured, ReplayModel(loaded), "model")
    container = Container(memoryview(data))
    (part,) = (part for part in container.parts if part.spec.tensor.name == "tokens")
    ways = [way for _, _, way, _, _ in tokens._chunks(container.part(part).streams[0].data, 170, 32)]
    assert ways.count(tokens.FAST) == drift
    read = []
    with monkeypatch.context() as only_here:
        only_here.setattr(TokenSteps, "logits", lambda self, token: read.append(token) or exact(self, token))
        assert decompress(opened(data, ReplayModel(loaded))) == captured.read_bytes()
    assert len(read) == 169  # each token but the last, once
    monkeypatch.setattr(TokenSteps, "logits", lambda self, token: exact(self, token)[::-1])
    with pytest.raises(MismatchError, match="predictions"):
        decompress(opened(data, ReplayModel(loaded)))


class Otherwise(ReplayModel):
    """A model that computes with another rounding, as another machine does."""

    def cache(self, ids: np.ndarray, steps: Sequence[int], first: Callable[[Cache], None] | None = None) -> Cache:
        def other(cache: Cache) -> Cache:
            return {name: self.rounded(name, bits) for name, bits in cache.items()}

        return other(super().cache(ids, steps, None if first is None else lambda cache: first(other(cache))))

    @staticmethod
    def rounded(_: str, bits: np.ndarray) -> np.ndarray:
        noise = (bits.astype(np.int64) * 40503 >> 7) % 5 - 2
        far = (bits & 0x7FFF > 16) & (bits & 0x7FFF < 0x7F00)
        return np.where(far, bits + noise, bits).astype(bits.dtype)


def test_another_machines_cache_is_a_residual(loaded: Model, captured: Path) -> None:
    """A capture that this machine computes otherwise: the file has residuals, and comes back bit for bit here."""
    data = compress(captured, Otherwise(loaded))
    container = Container(memoryview(data))
    assert all(part.streams for part in container.parts if part.spec.tensor.layer is not None)
    assert decompress(opened(data, Otherwise(loaded))) == captured.read_bytes()


def test_a_machine_that_computes_otherwise_refuses(loaded: Model, captured: Path) -> None:
    data = compress(captured, ReplayModel(loaded))
    with pytest.raises(MismatchError, match=r"otherwise .* --approximate"):
        decompress(opened(data, Otherwise(loaded)))
    file = opened(data, Otherwise(loaded), approximate=True)
    near = decompress(file)
    assert file.replay is not None
    assert len(file.replay.differing) == sum(part.spec.tensor.layer is not None for part in file.container.parts)
    assert 0.5 < file.replay.sampled < 1
    exact = captured.read_bytes()
    assert near != exact
    assert len(near) == len(exact)


def test_what_the_sample_misses_the_digests_find(loaded: Model, captured: Path) -> None:
    class Once(Otherwise):
        @staticmethod
        def rounded(name: str, bits: np.ndarray) -> np.ndarray:
            found = bits.copy()
            found[0, -1:, 0] ^= name == "layers.1.values"
            return found

    data = compress(captured, ReplayModel(loaded))
    with pytest.raises(MismatchError, match=r"layers\.1\.values.* does not come back"):
        decompress(opened(data, Once(loaded)))
    file = opened(data, Once(loaded), approximate=True)
    decompress(file)
    assert file.replay is not None
    assert file.replay.differing == ["layers.1.values[0:170]"]


def test_both_decoders_agree(loaded: Model, captured: Path) -> None:
    capture = Capture.open(captured)

    def computed(model: ReplayModel) -> reference_replay.Computed:
        steps = [100, 50, *[1] * 20]

        def logits(before: list[int]) -> np.ndarray:
            reader = TokenSteps(loaded, 0, None)
            found = [reader.logits(token) for token in before]
            return found[-1] if found else np.zeros(256, np.float32)

        return reference_replay.Computed(lambda ids: dict(model.cache(ids, steps)), logits)

    assert json.loads(capture.metadata["schedule"]) == {"decode": 20, "prefill": [100, 50]}
    for model, coder in ((ReplayModel(loaded), "fast"), (Otherwise(loaded), "fast"), (ReplayModel(loaded), "model")):
        data = compress(captured, model, coder, drop=("continuation", "queries.*"))
        theirs = reference_decoder.decode(data, b"", computed(model))
        assert theirs == decompress(opened(data, model))


def test_a_range_and_single_tensors(loaded: Model, captured: Path) -> None:
    capture = Capture.open(captured)
    file = opened(compress(captured, ReplayModel(loaded), chunk_tokens=128), ReplayModel(loaded))
    assert np.array_equal(file.read("layers.1.keys", slice(120, 140)), capture.read("layers.1.keys")[:, 120:140])
    sink = io.BytesIO()
    jobs.decompress(file, sink, jobs.Selection(frozenset({0}), (3, 150)))
    assert np.array_equal(np.frombuffer(sink.getvalue()[-147 * 4 :], np.int32), capture.read("tokens")[3:150])


def test_a_wrong_token_is_named(loaded: Model, captured: Path, tmp_path: Path) -> None:
    def other(ids: np.ndarray) -> None:
        ids[77] = (int(ids[77]) + 1) % 256

    path = changed(captured, tmp_path / "b.safetensors", "tokens", other)
    with pytest.raises(MismatchError, match="token 77 is not the one"):
        compress(path, ReplayModel(loaded))

    def beyond(ids: np.ndarray) -> None:
        ids[5] = 256

    with pytest.raises(MismatchError, match="vocabulary"):
        compress(changed(captured, tmp_path / "c.safetensors", "tokens", beyond), ReplayModel(loaded))


def test_another_deeper_layer_is_named(loaded: Model, captured: Path, tmp_path: Path) -> None:
    def negated(bits: np.ndarray) -> None:
        bits ^= 0x8000

    path = changed(captured, tmp_path / "b.safetensors", "layers.1.values", negated)
    with pytest.raises(MismatchError, match=r"layers\.1\.values differs"):
        compress(path, ReplayModel(loaded))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"schedule": None}, "schedule"),
        ({"schedule": {"prefill": [169], "decode": 0}}, "schedule of 169 tokens"),
        ({"schedule": {"prefill": [0, 170], "decode": 0}}, "schedule"),
        ({"schedule": {"prefill": [170], "decode": -1}}, "schedule"),
        ({"schedule": [170]}, "schedule"),
    ],
)
def test_captures_that_cannot_be_replayed_are_refused(
    loaded: Model, captured: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = changed(captured, tmp_path / "b.safetensors", "tokens", unchanged, **metadata)
    with pytest.raises(MismatchError, match=message):
        compress(path, ReplayModel(loaded))


def test_the_wrong_shape_is_refused(captured: Path, tmp_path: Path) -> None:
    for name, message in (("llama-mha", "heads"), ("gpt-neox", "heads|rows|differs|otherwise|is not the one")):
        other = load_model(str(save_model(CONFIGS[name](), tmp_path / name)), "bf16", "cpu")
        with pytest.raises(MismatchError, match=message):
            compress(captured, ReplayModel(other))
    fewer = load_model(
        str(save_model(t.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}), tmp_path / "1")), "bf16", "cpu"
    )
    with pytest.raises(MismatchError, match="tensors of keys and values"):
        compress(captured, ReplayModel(fewer))


def test_a_cache_serves_from_python(loaded: Model, captured: Path, tmp_path: Path) -> None:
    import kvpack

    path = tmp_path / "a.kvp"
    path.write_bytes(compress(captured, ReplayModel(loaded)))
    cache = kvpack.open(path, model=ReplayModel(loaded)).to_cache()
    expected = to_float32(Capture.open(captured).read("layers.1.keys"), "BF16")
    assert np.array_equal(cache.layers[1].keys[0].float().numpy(), expected)


def test_parts_that_differ_are_noted_only_when_asked() -> None:
    with pytest.raises(MismatchError, match="x does not come back"):
        Replay({}).differs("x")
    replay = Replay({}, approximate=True)
    replay.differs("x")
    assert replay.differing == ["x"]


# ---- The command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture by the model in its own dtype, float32, as the command line makes it."""
    return save_capture(load_model(str(folder), "auto", "cpu"), tmp_path_factory.mktemp("capture") / "a.safetensors")


def test_there_and_back(cli: Cli, folder: Path, on_disk: Path, tmp_path: Path) -> None:
    for coder in ("fast", "model"):
        packed, back = tmp_path / f"{coder}.kvp", tmp_path / f"{coder}.safetensors"
        made = cli("compress", on_disk, "-c", "replay", "-m", folder, "--token-coder", coder, "-o", packed)
        assert (made.code, made.err) == (0, "")
        done = cli("decompress", packed, "-m", folder, "-o", back)
        assert done.code == 0
        assert "(bit-exact)" in done.out
        assert back.read_bytes() == on_disk.read_bytes()
        assert cli("decompress", "-t", packed, "-m", folder).code == 0
        assert cli("inspect", packed, "--check").code == 0
        assert cli("verify", on_disk, packed, "--replay-model", folder, "--bit-exact").code == 0


def test_another_model_is_refused_before_it_is_loaded(
    cli: Cli, folder: Path, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "a.kvp"
    assert cli("compress", on_disk, "-c", "replay", "-m", folder, "-o", packed).code == 0
    weights, config = tmp_path / "weights", tmp_path / "config"
    for other in (weights, config):
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
    document = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**document, "rms_norm_eps": 0.1}))
    model = t.AutoModelForCausalLM.from_pretrained(weights)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(weights)
    (weights / "config.json").write_bytes((folder / "config.json").read_bytes())
    monkeypatch.setattr(t.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    for other, what in ((weights, "weights"), (config, "configuration")):
        for command in (("decompress", packed), ("compress", on_disk, "-c", "replay")):
            found = cli(*command, "-m", other, "-o", tmp_path / "out")
            assert found.code == 5
            assert what in found.err
            assert len(found.err.splitlines()) == 1
            assert not (tmp_path / "out").exists()


def test_another_machine_from_the_shell(
    cli: Cli, folder: Path, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, back = tmp_path / "a.kvp", tmp_path / "b.safetensors"
    assert cli("compress", on_disk, "-c", "replay", "-m", folder, "-o", packed).code == 0
    monkeypatch.setattr("kvpack.capture.ReplayModel", Otherwise)
    monkeypatch.setattr(Otherwise, "rounded", staticmethod(lambda _, bits: bits ^ 1))
    refused = cli("decompress", packed, "-m", folder, "-o", back)
    assert refused.code == 5
    assert "--approximate" in refused.err
    assert not back.exists()
    taken = cli("decompress", packed, "-m", folder, "-o", back, "--approximate")
    assert taken.code == 0
    assert "(approximate)" in taken.out
    assert "100% of the sampled elements" in taken.err
    as_json = json.loads(cli("decompress", packed, "-m", folder, "-o", back, "-f", "--approximate", "--json").out)
    assert as_json["differing_sampled"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-c", "replay", "--rm"), "--rm is refused with replay"),
        (("-c", "lossless", "--token-coder", "model"), "for the codec replay"),
        (("-c", "lossless", "-m", "x"), "for the codec replay"),
    ],
)
def test_options_that_contradict_each_other(
    cli: Cli, on_disk: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    found = cli("compress", on_disk, *arguments, "-o", tmp_path / "out")
    assert found.code == 2
    assert message in found.err
    assert on_disk.exists()


def test_a_file_that_is_replayed_is_not_removed(cli: Cli, folder: Path, on_disk: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.kvp"
    assert cli("compress", on_disk, "-c", "replay", "-m", folder, "-o", packed).code == 0
    found = cli("decompress", packed, "-m", folder, "-o", tmp_path / "out", "--rm")
    assert found.code == 2
    assert "--rm is refused with replay" in found.err
    assert packed.exists()
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_checked_is_said(cli: Cli, folder: Path, on_disk: Path, tmp_path: Path) -> None:
    foreign = changed(on_disk, tmp_path / "foreign.safetensors", "tokens", unchanged, model=None)
    found = cli("compress", foreign, "-c", "replay", "-m", folder, "-o", tmp_path / "a.kvp")
    assert found.code == 0
    assert "does not say which model made it" in found.err

    def otherwise(bits: np.ndarray) -> None:
        bits[:] ^= 1

    other = changed(on_disk, tmp_path / "other.safetensors", "layers.1.keys", otherwise)
    found = cli("compress", other, "-c", "replay", "-m", folder, "-o", tmp_path / "b.kvp")
    assert found.code == 0
    assert "does not compute the cache bit for bit" in found.err
    assert cli("decompress", tmp_path / "b.kvp", "-m", folder, "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == other.read_bytes()


def test_foreign_captures_say_what_they_lack(cli: Cli, small: Path, tmp_path: Path) -> None:
    """The fixture has two of thirty layers, so the model cannot compute it."""
    found = cli("compress", small, "-c", "replay", "-o", tmp_path / "out")
    assert found.code == 5
    assert str(small) in found.err


def test_a_gpus_cache_is_refused_on_a_cpu(cli: Cli, tmp_path: Path) -> None:
    """A file that an NVIDIA H200 wrote, of 160 tokens by the embedded model."""
    made, out = FIXTURES / "replay-h200.kvp", tmp_path / "out.safetensors"
    refused = cli("decompress", made, "-o", out, "--device", "cpu")
    assert refused.code == 5
    assert "otherwise" in refused.err
    assert not out.exists()
    taken = json.loads(cli("decompress", made, "-o", out, "--device", "cpu", "--approximate", "--json").out)
    assert 0.3 < taken["differing_sampled"] < 1
    assert 50 <= taken["differing"] <= 60
    assert Capture.open(out).tensors["layers.29.values"].shape == (3, 160, 64)
