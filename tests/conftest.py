"""What several tests share: real captures, and the command line run in this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import is_hypothesis_test, settings

from kvpack.cache import Window, WindowSpec
from kvpack.cli.main import main
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Codec, PartStreams
from kvpack.codecs.recipes import family_of
from kvpack.engine import CpuEngine, Engine
from kvpack.formats.safetensors import TensorFile, build_header

settings.register_profile("short", deadline=None, max_examples=50)  # The first call of a kernel compiles it.
settings.register_profile("long", deadline=None, max_examples=1000)
settings.load_profile("short")

FIXTURES = Path(__file__).parent.parent / "fixtures"
SMALL = FIXTURES / "smollm2-160.safetensors"
"""SmolLM2-135M, layers 0 and 29, 160 tokens of prose, 8 probe queries."""


def pytest_configure(config: pytest.Config) -> None:
    """Give property tests more examples in the long run, before any test module is imported.

    Tests run on two processes, so each computes models on one thread.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["KVPACK_PROFILES"] = os.devnull  # Profiles that this machine's user has installed play no part.
    if config.option.markexpr == "long":
        settings.load_profile("long")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run property tests in the long run as well as in the short one, with more examples."""
    if config.option.markexpr == "long":
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker("long")


def one_of_each_family(names: Iterable[str]) -> list[Any]:
    """Test parameters of all these codecs: of a family the short run takes the middle rate, the long run the rest."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family_of(name), []).append(name)
    return [
        pytest.param(name, marks=() if name == rates[len(rates) // 2] else pytest.mark.long)
        for rates in families.values()
        for name in rates
    ]


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str
    raw: bytes


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run ``kvpack`` with arguments, and bytes on standard input."""

    def run(*arguments: object, stdin: bytes = b"") -> Result:
        streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="") for data in (stdin, b"", b"")]
        monkeypatch.setattr(sys, "argv", ["kvpack", *map(str, arguments)])
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as stopped:
            main()
        for stream in streams[1:]:
            stream.flush()
        raw, err = (stream.buffer.getvalue() for stream in streams[1:])  # type: ignore[attr-defined]
        code = stopped.value.code
        return Result(
            code if isinstance(code, int) else int(code is not None), raw.decode(errors="replace"), err.decode(), raw
        )

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the small real capture."""
    path = tmp_path / "small.safetensors"
    path.write_bytes(SMALL.read_bytes())
    return path


@pytest.fixture(scope="session")
def gpu() -> Iterator[Any]:
    """A GPU where there is one; else its kernels run on the CPU, compiled by g++ (``gpu/simt.py``)."""
    sys.path.insert(0, str(Path(__file__).parent / "gpu"))
    import simt  # on the path with the tests of ``gpu/``, which alone ask for it
    import torch

    if torch.cuda.is_available():
        from kvpack.gpu.runtime.launch import Gpu

        yield Gpu()
    elif simt.COMPILER:
        yield simt.Emulator()
    else:
        pytest.skip("neither a GPU nor g++")


def nmse(back: np.ndarray, exact: np.ndarray) -> float:
    """The squared error over the energy of ``exact``: 1 for zeros, which no codec may give."""
    return float(np.square(back - exact).sum(dtype=np.float64) / np.square(exact).sum(dtype=np.float64))


def engine_on(gpu: Any, threads: int | None = None) -> Engine:
    """The engine of a GPU or what stands in for one; that of the CPU for None."""
    if gpu is None:
        return CpuEngine(threads)
    from kvpack.gpu.engine import GpuEngine

    return GpuEngine(gpu, threads)


def encode_window(
    codec: Codec, window: WindowSpec, bits: Sequence[np.ndarray], context: DecodeContext | None = None
) -> list[PartStreams]:
    """The streams of a window's parts, without hints."""
    return codec.encode(Window(window, tuple(bits)), context or DecodeContext(), Hints())


def write_tensors(
    path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str] | None = None
) -> Path:
    """A safetensors file of bit patterns: name to (dtype, array)."""
    header = build_header([(n, d, a.shape) for n, (d, a) in tensors.items()], metadata or {})
    data = b"".join(np.ascontiguousarray(a).tobytes() for _, a in tensors.values())
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    TensorFile.open(path)
    return path
