"""Many captures whose parts share a GPU's batches: each file is the one that the CPU makes of it alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, engine_on, write_tensors

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.errors import FormatError
from kvpack.formats.source import Capture
from kvpack.gpu.engine import engine, lossless

Tensors = dict[str, tuple[str, np.ndarray]]
Cli = Callable[..., Any]


class Counting:
    """Another launcher, and how often each kernel was launched."""

    def __init__(self, gpu: Any) -> None:
        self.device, self.max_shared, self._gpu = gpu.device, gpu.max_shared, gpu
        self.counts: dict[str, int] = {}

    def side_stream(self) -> AbstractContextManager[Any]:
        return self._gpu.side_stream()

    def join(self) -> None:
        self._gpu.join()

    def launch(self, name: str, *arguments: Any) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1
        self._gpu.launch(name, *arguments)


def cut(first: int, last: int) -> Tensors:
    """Tokens of the small real capture, with the tensors beside them."""
    whole = Capture.open(SMALL)
    found = {}
    for name, spec in whole.tensors.items():
        bits = whole.read(name)
        if name.startswith("layers."):
            bits = bits[:, first:last]
        elif name == "tokens":
            bits = bits[first:last]
        found[name] = (spec.dtype, bits.copy())
    return found


def captures(folder: Path) -> list[Path]:
    """Of equal and of different lengths; with another dtype, NaN, odd dimensions, no tokens, no tensors."""
    spans = [(0, 64), (10, 74), (0, 160), (30, 94), (0, 130), (96, 160), (0, 128), (5, 133), (7, 71), (0, 160)]
    every = [cut(*span) for span in spans]
    every[3]["layers.0.keys"] = ("F16", every[3]["layers.0.keys"][1])
    every[5]["layers.29.values"][1][1, 7, 3] = 0x7FC1
    every[6]["layers.0.values"] = ("BF16", every[6]["layers.0.values"][1][:, :, :33].copy())
    every[8]["layers.29.keys"] = ("BF16", every[8]["layers.29.keys"][1][:, :0].copy())
    every[4:4] = [{}, {"tokens": every[0]["tokens"]}]
    return [write_tensors(folder / f"{i}.safetensors", tensors) for i, tensors in enumerate(every)]


def alone(paths: list[Path], codec: str, chunk: int = 2048, gpu: Any = None) -> list[bytes]:
    made = []
    for path in paths:
        sink = io.BytesIO()
        jobs.compress(path, sink, CODECS[codec], chunk_tokens=chunk, engine=engine_on(gpu))
        made.append(sink.getvalue())
    return made


def plans(paths: list[Path], codec: str = "lossless", chunk: int = 2048) -> Iterator[jobs.CompressJob]:
    for path in paths:
        yield jobs.prepare(Capture.open(path), CODECS[codec], chunk_tokens=chunk)


def written(every: Iterable[jobs.CompressJob], gpu: Any) -> Iterator[bytes]:
    for write in jobs.compress_many(every, engine=engine_on(gpu)):
        sink = io.BytesIO()
        write(sink, None)
        yield sink.getvalue()


def together(paths: list[Path], gpu: Any, codec: str = "lossless", chunk: int = 2048) -> list[bytes]:
    return list(written(plans(paths, codec, chunk), gpu))


@pytest.mark.parametrize("chunk", [128, 2048])
def test_files_are_those_made_alone(gpu: Any, tmp_path: Path, chunk: int) -> None:
    paths = captures(tmp_path)
    assert together(paths, gpu, chunk=chunk) == alone(paths, "lossless", chunk)


def test_what_a_lossy_codec_carries_is_shared_too(gpu: Any, tmp_path: Path) -> None:
    paths = [path for path in captures(tmp_path) if path.stem not in ("4", "5")]  # those have no layers
    assert together(paths, gpu, "kivi-4") == alone(paths, "kivi-4")


def test_batches_are_given_up_early_where_parts_wait(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = captures(tmp_path)
    expected = alone(paths, "lossless", 128)
    for ahead, most in ((1, 512), (60_000, 3), (200_000, 512)):
        monkeypatch.setattr(engine, "AHEAD_BYTES", ahead)
        monkeypatch.setattr(lossless, "BATCH_PARTS", most)
        assert together(paths, gpu, chunk=128) == expected


def test_parts_of_one_shape_share_launches(gpu: Any, tmp_path: Path) -> None:
    paths = [write_tensors(tmp_path / f"{i}", cut(i, i + 64)) for i in range(6)]
    shared, single = Counting(gpu), Counting(gpu)
    assert together(paths, shared) == alone(paths, "lossless", gpu=single)
    for name, count in single.counts.items():
        assert shared.counts[name] * len(paths) == count, name


def test_captures_of_alternating_lengths_share_launches(gpu: Any, tmp_path: Path) -> None:
    paths = [write_tensors(tmp_path / f"{i}", cut(0, 64 + 32 * (i % 2))) for i in range(8)]
    shared, single = Counting(gpu), Counting(gpu)
    assert together(paths, shared) == alone(paths, "lossless", gpu=single)
    assert sum(shared.counts.values()) * 2 < sum(single.counts.values())


def test_captures_are_open_a_window_at_a_time(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = captures(tmp_path) * 3
    monkeypatch.setattr(engine, "AHEAD_JOBS", 1)
    opened = 0

    def counted() -> Iterator[jobs.CompressJob]:
        nonlocal opened
        for plan in plans(paths):
            opened += 1
            yield plan

    for done, write in enumerate(jobs.compress_many(counted(), engine=engine_on(gpu))):
        assert opened - done <= 2 * (engine.SLOTS + 2)  # two a batch under way, and those that wait
        write(io.BytesIO(), None)
    assert opened == len(paths)
    assert together(paths, gpu) == alone(paths, "lossless")


def test_a_file_that_is_not_written_does_not_shift_the_next(gpu: Any, tmp_path: Path) -> None:
    paths = [write_tensors(tmp_path / f"{i}", cut(i, i + 64)) for i in range(3)]
    sink = io.BytesIO()
    for number, write in enumerate(jobs.compress_many(plans(paths), engine=engine_on(gpu))):
        if number == 2:
            write(sink, None)
    assert sink.getvalue() == alone(paths, "lossless")[2]


def test_one_that_cannot_be_planned_does_not_lose_those_before(gpu: Any, tmp_path: Path) -> None:
    paths = captures(tmp_path)
    paths[2].write_bytes(b"not a safetensors file")
    for launcher in (None, gpu):
        made: list[bytes] = []
        with pytest.raises(FormatError, match="safetensors: not a safetensors file"):
            made.extend(written(plans(paths), launcher))
        assert made == alone(paths[:2], "lossless")


def test_the_command_line(gpu: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in order; a bad one stops no other."""
    asked = []

    def find_gpu(device: str, size: int) -> tuple[Any, None]:
        asked.append((device, size))
        return gpu, None

    monkeypatch.setattr("kvpack.gpu.runtime.host.find_gpu", find_gpu)
    paths = captures(tmp_path)
    done = cli("compress", *paths)
    assert [line.split(" -> ")[0] for line in done.out.splitlines()] == list(map(str, paths))
    assert asked == [("auto", sum(path.stat().st_size for path in paths))]
    packed = [path.with_name(path.name + ".kvp") for path in paths]
    assert [path.read_bytes() for path in packed] == alone(paths, "lossless")
    for path in packed:
        path.unlink()
    paths[7].write_bytes(b"not a safetensors file")
    bad = cli("compress", *paths)
    assert bad.code == 4
    assert bad.err == f"kvpack: {paths[7]}: not a safetensors file\nkvpack: 1 of {len(paths)} files failed\n"
    assert len(bad.out.splitlines()) == len(paths) - 1
    others = [path for number, path in enumerate(packed) if number != 7]
    assert sorted(tmp_path.iterdir()) == sorted([*paths, *others])
    assert [path.read_bytes() for path in others] == alone([*paths[:7], *paths[8:]], "lossless")
