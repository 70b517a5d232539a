"""Files of KIVI and TurboQuant from a GPU and from the CPU: KIVI's are the same bytes, each reads the other's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import engine_on, nmse

from kvpack import jobs
from kvpack.cache import PartSpec
from kvpack.codecs.chain.base import Part
from kvpack.codecs.chain.entropy.rans import Rans
from kvpack.codecs.chain.pipeline import route_of
from kvpack.codecs.chain.quantizers.lloyd_max.reference import centroids
from kvpack.codecs.recipes import CODECS, Chain
from kvpack.errors import CorruptError
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture
from kvpack.gpu.engine import planes
from kvpack.jobs.compression import Compressed
from kvpack.jobs.opened import Opened
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container
from kvpack.numerics.floats import to_float32

SMALL = Path(__file__).parents[2] / "fixtures" / "smollm2-160.safetensors"
LONG = pytest.mark.long


def layers() -> dict[str, np.ndarray]:
    """Keys and values of the small capture."""
    given = Capture.open(SMALL)
    return {name: given.read(name) for name, spec in given.tensors.items() if layer_of(spec) is not None}


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    header = build_header([(n, "BF16", a.shape) for n, a in tensors.items()], {})
    data = b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return path


def longer(path: Path, tokens: int) -> Path:
    """The small capture's keys and values, there and back again until they are so many tokens."""
    twice = {name: np.concatenate([a, a[:, ::-1], a], axis=1)[:, :tokens] for name, a in layers().items()}
    return write(path, twice)


def compress(source: Path, gpu: Any, codec: str, chunk: int = 2048) -> tuple[bytes, Compressed]:
    sink = io.BytesIO()
    done = jobs.compress(source, sink, CODECS[codec], chunk_tokens=chunk, engine=engine_on(gpu))
    return sink.getvalue(), done


def opened(data: bytes) -> KvpFile:
    return KvpFile(Container(memoryview(data)))


def decompress(data: bytes, gpu: Any) -> bytes:
    sink = io.BytesIO()
    jobs.decompress(opened(data), sink, engine=engine_on(gpu))
    return sink.getvalue()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is not written is NaN, or as large as can be."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CPU would do instead fails."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the CPU was asked")

    monkeypatch.setattr("kvpack.gpu.engine.engine.run_task", refused)


@pytest.mark.parametrize(("tokens", "chunk"), [(96, 2048), (160, 128), (160, 2048), (300, 128), (480, 256)])
@pytest.mark.parametrize("codec", ["kivi-3", *(pytest.param(name, marks=LONG) for name in ("kivi-4", "kivi-2"))])
def test_kivis_file_is_the_same(gpu: Any, tmp_path: Path, codec: str, tokens: int, chunk: int) -> None:
    source = longer(tmp_path / "longer.safetensors", tokens)
    cpu, mine = compress(source, None, codec, chunk), compress(source, gpu, codec, chunk)
    assert mine == cpu
    assert decompress(cpu[0], gpu) == decompress(cpu[0], None)


def test_a_whole_capture(gpu: Any) -> None:
    """With probes and tokens beside keys and values, which go their own ways."""
    cpu, mine = compress(SMALL, None, "kivi-4"), compress(SMALL, gpu, "kivi-4")
    assert mine == cpu
    assert decompress(cpu[0], gpu) == decompress(cpu[0], None)


@pytest.mark.usefixtures("gpu_alone")
@pytest.mark.parametrize(("codec", "bound"), [("kivi-4", 0.02), ("turboquant-3", 0.04)])
def test_the_gpu_does_it_all(gpu: Any, tmp_path: Path, codec: str, bound: float) -> None:
    source = longer(tmp_path / "longer.safetensors", 300)
    data, done = compress(source, gpu, codec, 128)
    assert not done.carried
    assert nmse(*(floats(raw) for raw in (decompress(data, gpu), source.read_bytes()))) < bound


def floats(raw: bytes) -> np.ndarray:
    """All values of a capture of bf16 alone."""
    return to_float32(np.frombuffer(raw[8 + int.from_bytes(raw[:8], "little") :], np.uint16), "BF16")


def planes_of(data: bytes) -> list[tuple[PartSpec, Chain, list[np.ndarray]]]:
    """Each part, its chain and its planes, as the CPU reads them."""
    archive, found = opened(data), []
    for part in archive.container.parts:
        chain = archive.codecs[part.codec].chain_for(part.spec)
        specs = route_of(chain, described(part.spec)).stored
        streams = archive.container.part(part).streams
        codes = [chain.entropy.decode(stream.data, spec) for stream, spec in zip(streams, specs, strict=True)]
        found.append((part.spec, chain, codes))
    return found


def described(plan: PartSpec) -> Part:
    return Part(plan.tensor.dtype, plan.shape, plan.first, plan.length)


@pytest.mark.parametrize(
    ("codec", "dims"),
    [
        *(("turboquant-1", 64), ("turboquant-3", 128)),
        *(pytest.param(f"turboquant-{bits}", dims, marks=LONG) for bits, dims in ((1, 128), (2, 64), (2, 128))),
        *(pytest.param(f"turboquant-{bits}", dims, marks=LONG) for bits, dims in ((3, 64), (4, 64), (4, 128))),
    ],
)
def test_turboquants_file_differs_in_ties_alone(gpu: Any, tmp_path: Path, codec: str, dims: int) -> None:
    tensors = {name: np.concatenate([a] * (dims // 64), axis=2) for name, a in layers().items()}
    source = write(tmp_path / "given.safetensors", tensors)
    (cpu, by_cpu), (mine, by_gpu) = compress(source, None, codec, 128), compress(source, gpu, codec, 128)
    assert by_cpu.carried == by_gpu.carried == []
    assert abs(len(mine) - len(cpu)) < len(cpu) // 1000 + 16
    assert [part.digest for part in opened(mine).container.parts] == [
        part.digest for part in opened(cpu).container.parts
    ]
    for (plan, chain, got), (_, _, expected) in zip(planes_of(mine), planes_of(cpu), strict=True):
        values = to_float32(Capture.open(source).part(plan), "BF16")
        rotated = chain.transforms[0].forward(values, described(plan))
        norms, others = (((c[1].astype(np.uint16) << 10) | c[2]).view(np.float16) for c in (expected, got))
        assert np.abs(norms.view(np.int16) - others.view(np.int16)).max() <= 1
        differ = got[0] != expected[0]
        assert differ.mean() < 1e-3
        levels = centroids(int(codec[-1]), dims)
        unit = rotated / norms.astype(np.float32)
        away = np.abs(unit[differ][:, None] - (levels[1:] + levels[:-1]) / 2).min(axis=1)
        assert away.max(initial=0) < 5e-4
    for file in (cpu, mine):
        assert_near(decompress(file, gpu), decompress(file, None))


def assert_near(mine: bytes, theirs: bytes) -> None:
    """Of captures of bf16 alone: within its rounding."""
    start = 8 + int.from_bytes(theirs[:8], "little")
    assert mine[:start] == theirs[:start]
    a, b = floats(mine), floats(theirs)
    finite = np.isfinite(b)
    assert (np.isfinite(a) == finite).all()
    a, b = a[finite], b[finite]
    assert b.any()
    assert (np.abs(a - b) <= np.abs(b) * 2.0**-7 + np.abs(b).max() * 1e-5).all()


def assert_same_file(mine: bytes, theirs: bytes, codec: str) -> None:
    """The same bytes by KIVI; by TurboQuant norms within a unit in their last place, and few other codes."""
    if not codec.startswith("turboquant"):
        assert mine == theirs
        return
    assert [part.digest for part in opened(mine).container.parts] == [
        part.digest for part in opened(theirs).container.parts
    ]
    for (plan, chain, got), (_, other, expected) in zip(planes_of(mine), planes_of(theirs), strict=True):
        assert chain == other
        if chain.quantizer.exact:
            assert all((a == b).all() for a, b in zip(got, expected, strict=True)), plan.label
        elif expected[0].size:
            norms = [((c[1].astype(np.uint16) << 10) | c[2]).astype(int) for c in (got, expected)]
            assert np.abs(norms[0] - norms[1]).max() <= 1
            assert (got[0] != expected[0]).mean() < 1e-3


@pytest.mark.parametrize("codec", ["kivi-4", "kivi-2", "turboquant-3"])
def test_shapes_and_batches(gpu: Any, tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lengths and vectors, some not the kernels'; batches of no more than a few parts."""
    monkeypatch.setattr(planes.PlaneEncoding, "batch_bytes", 100_000)
    monkeypatch.setattr(planes.PlaneDecoding, "batch_bytes", 100_000)
    monkeypatch.setattr(planes, "BATCH_PARTS", 3)
    given = list(layers().values())
    shapes = [
        (3, 160, 64),
        (3, 160, 64),
        (2, 160, 32),
        (1, 150, 32),
        (3, 160, 33),
        (3, 150, 64),
        (1, 1, 64),
        (2, 0, 64),
    ]
    tensors = {
        f"layers.{i // 2}.{('keys', 'values')[i % 2]}": given[i % len(given)][: shape[0], : shape[1], : shape[2]]
        for i, shape in enumerate(shapes * 2)
    }
    source = write(tmp_path / "given.safetensors", tensors)
    (cpu, by_cpu), (mine, by_gpu) = compress(source, None, codec, 128), compress(source, gpu, codec, 128)
    assert by_cpu.carried == by_gpu.carried
    assert_same_file(mine, cpu, codec)
    assert_near(decompress(cpu, gpu), decompress(cpu, None))


@pytest.mark.parametrize(("codec", "where", "value", "carried"), [
    ("kivi-4", 5, 0x7FC1, True),
    ("kivi-4", 5, 0xFF80, True),
    ("kivi-4", 5, 0x7F00, True),  # finite, but beyond fp16
    ("kivi-4", 100, 0x7FC1, False),  # kept whole
    ("turboquant-3", 5, 0x7FC1, True),
    ("turboquant-3", 5, 0x7F00, True),
])  # fmt: skip
@pytest.mark.parametrize("chunk", [128, 2048])
def test_what_cannot_be_represented_is_carried(
    gpu: Any, tmp_path: Path, codec: str, where: int, value: int, carried: bool, chunk: int
) -> None:
    tensors = layers()
    for name in ("layers.0.keys", "layers.29.values"):
        tensors[name] = tensors[name].copy()
        tensors[name][1, where, 7] = value
    source = write(tmp_path / "given.safetensors", tensors)
    (cpu, by_cpu), (mine, by_gpu) = compress(source, None, codec, chunk), compress(source, gpu, codec, chunk)
    assert by_gpu.carried == by_cpu.carried
    assert len(by_gpu.carried) == 2 * carried
    assert_same_file(mine, cpu, codec)
    for name in ("layers.0.keys", "layers.29.values"):
        assert opened(mine).read(name)[1, where, 7] == value
    assert_near(decompress(cpu, gpu), decompress(cpu, None))


def test_a_norm_that_fp16_cannot_hold_is_carried(gpu: Any, tmp_path: Path) -> None:
    tensors = {name: np.zeros((1, 40, 64), np.uint16) for name in ("layers.0.keys", "layers.0.values")}
    tensors["layers.0.values"][0, 3, 9] = 0x1000
    done = compress(write(tmp_path / "tiny.safetensors", tensors), gpu, "turboquant-3")[1]
    assert done.carried == ["layers.0.values[0:40]"]


def test_zeros_of_both_signs(gpu: Any, tmp_path: Path) -> None:
    tensors = layers()
    for name, bits in tensors.items():
        tensors[name] = np.where(bits & 3 > 1, bits & 0x8000, bits & 0x7FFF).astype(np.uint16)
    source = write(tmp_path / "zeros.safetensors", tensors)
    assert compress(source, gpu, "kivi-4") == compress(source, None, "kivi-4")


@pytest.mark.parametrize("codec", ["kivi-3", "turboquant-3"])
def test_tensors_on_the_device(gpu: Any, tmp_path: Path, codec: str) -> None:
    archive = opened(compress(longer(tmp_path / "longer.safetensors", 300), None, codec, 128)[0])
    for name, data in Opened(archive).tensors_on(gpu).items():
        assert str(data.device).startswith(gpu.device)
        found, expected = (
            to_float32(bits, "BF16")
            for bits in (data.cpu().view(torch.int16).numpy().view(np.uint16), archive.read(name))
        )
        assert expected.any()
        assert (np.abs(found - expected) <= np.abs(expected) * 2.0**-7 + np.abs(expected).max() * 1e-5).all()
        assert codec != "kivi-3" or (found == expected).all()


@pytest.mark.parametrize("codec", ["kivi-4", "turboquant-3"])
def test_damage_is_found(gpu: Any, tmp_path: Path, codec: str) -> None:
    head = {name: bits[:1] for name, bits in layers().items() if name.startswith("layers.29.")}
    good = compress(write(tmp_path / "head.safetensors", head), None, codec)[0]
    for record, offset in opened(good).container.parts[1].streams:
        for at in (0, record.size // 2, record.size - 1):
            changed = bytearray(good)
            changed[offset + at] ^= 1
            with pytest.raises(CorruptError):
                decompress(bytes(changed), gpu)


@pytest.mark.parametrize("codec", ["kivi-4", "turboquant-3"])
def test_unsound_streams_are_found(gpu: Any, tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams whose checksums hold, because they were made wrong: too short ones, and what stands in their heads."""
    source, encode = longer(tmp_path / "longer.safetensors", 200), Rans.encode
    for wrong in (lambda data: data[:-1], lambda data: data[:12] + bytes([data[12] ^ 0x55]) + data[13:]):
        with monkeypatch.context() as patched:
            patched.setattr(Rans, "encode", lambda self, codes, spec, wrong=wrong: wrong(encode(self, codes, spec)))
            data = compress(source, None, codec)[0]
        mine, theirs = (outcome(data, one) for one in (gpu, None))
        if mine is None or theirs is None or codec != "turboquant-3":
            assert mine == theirs
        else:
            assert_near(mine, theirs)


def outcome(data: bytes, gpu: Any) -> bytes | None:
    """What comes of a file; None where it is refused."""
    try:
        return decompress(data, gpu)
    except CorruptError:
        return None
