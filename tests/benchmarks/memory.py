"""Peak anonymous memory and speed of every command on a large capture, beside a small one. Linux alone.

    python tests/benchmarks/memory.py CAPTURE.safetensors FOLDER [--gb 4] [--codecs lossless,local-4] [--profile FILE]

The captures are made of copies of CAPTURE's tokens, one after another, in FOLDER (a RAM disk keeps the disk's speed out
of the figures). Anonymous memory (``RssAnon``) is sampled 100 times a second; pages of mapped files are not in it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kvpack.formats.safetensors import build_header
from kvpack.formats.source import Capture

SMALL_GB = 0.2


def tiled(source: Capture, path: Path, size: float) -> Path:
    """A capture of about ``size`` bytes, whose keys and values repeat those of ``source``."""
    layers = {name for name in source.tensors if name.startswith("layers.")}
    copies = max(1, round(size / sum(source.tensors[name].nbytes for name in layers)))
    entries, repeats = [], {}
    for name, entry in source.tensors.items():
        axis = {"tokens": 0, "attention_mass": 2}.get(name, 1 if name in layers else None)
        shape = list(entry.shape)
        if axis is not None:
            shape[axis] *= copies
            repeats[name] = axis
        entries.append((name, entry.dtype, shape))
    header = build_header(entries, source.metadata)
    with path.open("wb") as sink:
        sink.write(len(header.raw).to_bytes(8, "little") + header.raw)
        for name in source.tensors:
            bits = source.read(name)
            rows = bits.reshape(-1, int(np.prod(bits.shape[repeats[name] :]))) if name in repeats else [bits]
            for row in rows:
                for _ in range(copies if name in repeats else 1):
                    sink.write(np.ascontiguousarray(row).tobytes())
    return path


def measured(*arguments: object) -> tuple[float, float]:
    """Seconds, and peak anonymous memory in MB, of a command of kvpack.

    Raises:
        RuntimeError: The command failed.

    """
    command = [sys.executable, "-m", "kvpack", *map(str, arguments)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            text = status.read_text()
        except OSError:
            break
        found = [line for line in text.splitlines() if line.startswith("RssAnon")]
        peak = max(peak, *(int(line.split()[1]) for line in found), 0)
        time.sleep(0.01)
    if process.wait():
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.read() if process.stderr else ''}")
    return time.perf_counter() - start, peak * 1024 / 1e6


def main() -> None:
    """Print a line for every codec and command."""
    parser = argparse.ArgumentParser(description="Measure the memory that commands take.")
    parser.add_argument("capture", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--codecs", default="lossless,turboquant-3,local-4")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--commands", default="compress,decompress,test,verify")
    given = parser.parse_args()
    source = Capture.open(given.capture)
    files = [tiled(source, given.folder / f"memory-{size:g}.safetensors", size * 1e9) for size in (SMALL_GB, given.gb)]
    known = ["-D", given.profile] if given.profile else []
    columns = ("small MB/s", "large MB/s", "ratio", "small MB", "large MB")
    print(f"{'codec':14} {'command':12}", *(f"{column:>10}" for column in columns))
    for codec in given.codecs.split(","):
        rows: dict[str, list[tuple[float, float]]] = {}
        for path in files:
            packed, back = path.with_suffix(".kvp"), path.with_suffix(".back")
            commands = {
                "compress": ("compress", path, "-c", codec, "-o", packed, "-qf", "--device", "cpu", *known),
                "decompress": ("decompress", packed, "-o", back, "-qf", "--device", "cpu", *known),
                "test": ("decompress", "-t", packed, "-q", *known),
                "verify": ("verify", path, packed, "-q", *known),
            }
            for name, command in commands.items():
                if name in ("compress", *given.commands.split(",")):
                    seconds, peak = measured(*command)
                    rows.setdefault(name, []).append((path.stat().st_size / 1e6 / seconds, peak))
            for made in (packed, back):
                made.unlink(missing_ok=True)
        for name, ((slow, little), (fast, much)) in rows.items():
            print(
                f"{codec:14} {name:12} {slow:10.0f} {fast:10.0f} {fast / slow:10.2f} {little:10.0f} {much:10.0f}",
                flush=True,
            )
    for path in files:
        path.unlink()


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
