"""Compares the files that two versions of kvpack write, byte for byte. Run by hand, against a checkout of the other.

    git worktree add ../before COMMIT
    python tests/compare_versions.py ../before [--capture FILE.safetensors --profile FILE.kvprofile]

Every codec compresses the fixtures in windows of 2,048 and 128 tokens, with values that are not finite and with layers
of unlike lengths among them, and the capture that is given. What is compared by SHA-256: the compressed file, what it
decompresses to, and selections of a layer and of tokens. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
CHUNKS = (2048, 128)
SELECTIONS = (["--layers", "0"], ["--tokens", "100:150"], ["--layers", "0", "--tokens", "3:140"])

WORKER = """
import hashlib, json, sys
from pathlib import Path
from kvpack.cli.main import main

def run(*arguments):
    sys.argv = ["kvpack", *map(str, arguments)]
    try:
        main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)

def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

folder = Path(sys.argv[1])
for line in Path(sys.argv[2]).read_text().splitlines():
    label, source, codec, chunk, profile, selections = json.loads(line)
    packed, back = folder / "x.kvp", folder / "x.safetensors"
    known = ["-D", profile] if profile else []
    options = ["--chunk-tokens", chunk, "--device", "cpu", "-qf", *known]
    found = [run("compress", source, "-c", codec, "-o", packed, *options)]
    found.append(digest(packed))
    if packed.exists():
        for options in ([], *selections):
            found.append(run("decompress", packed, "-o", back, "--device", "cpu", "-qf", *known, *options))
            found.append(digest(back))
            back.unlink(missing_ok=True)
        found.append(run("decompress", "-t", packed, "-q", *known))
    packed.unlink(missing_ok=True)
    print(json.dumps([label, found]), file=sys.__stdout__, flush=True)
"""


def variants(folder: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, file, and whether it is of the small profile's model."""
    from profiles import tiny_capture

    from kvpack.formats.safetensors import TensorFile

    small = FIXTURES / "smollm2-160.safetensors"
    tiny = tiny_capture(folder / "tiny.safetensors")
    yield "small", small, False
    yield "tiny", tiny, True
    for name, source, profiled in (("small", small, False), ("tiny", tiny, True)):
        file = TensorFile.open(source)
        nan, ragged = {}, {}
        for entry in file.header.tensors:
            bits = np.frombuffer(file.data(entry), f"<u{entry.itemsize}").reshape(entry.shape).copy()
            nan[entry.name] = ragged[entry.name] = (entry.dtype, bits)
            if entry.name == "layers.0.keys":
                spoilt = bits.copy()
                spoilt[0, 5, 3] = 0x7FC0
                nan[entry.name] = (entry.dtype, spoilt)
            elif entry.name.startswith("layers.29."):
                ragged[entry.name] = (entry.dtype, bits[:, :130])
        yield f"{name} with a NaN", written(folder / f"{name}-nan.safetensors", nan, file.metadata), profiled
        yield f"{name}, ragged", written(folder / f"{name}-ragged.safetensors", ragged, file.metadata), profiled


def written(path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> Path:
    """A safetensors file of bit patterns."""
    from conftest import write_tensors

    return write_tensors(path, tensors, metadata)


def jobs(folder: Path, capture: Path | None, profile: Path | None) -> Iterator[list[object]]:
    """What both versions do: label, source, codec, tokens per window, profile, selections."""
    from kvpack.codecs.protocol import Need
    from kvpack.codecs.recipes import CODECS

    for name, codec in CODECS.items():
        needs = Need.PROFILE in codec.traits.needs
        for label, path, tiny in variants(folder):
            if needs == tiny:
                for chunk in CHUNKS:
                    own = str(FIXTURES / "tiny.kvprofile") if needs else None
                    yield [f"{label}, {chunk} tokens, {name}", str(path), name, chunk, own, SELECTIONS]
        if capture is not None and (profile is not None or not needs):
            own = str(profile) if needs else None
            for chunk in CHUNKS if capture.stat().st_size < 100e6 else CHUNKS[:1]:
                yield [f"{capture.name}, {chunk} tokens, {name}", str(capture), name, chunk, own, SELECTIONS[2:]]


def outcomes(checkout: Path, folder: Path, listed: Path) -> subprocess.Popen[str]:
    """One version at work."""
    own = folder / hashlib.sha256(str(checkout).encode()).hexdigest()[:8]
    own.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(own), str(listed)]
    return subprocess.Popen(
        command, cwd=own, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the files that two versions of kvpack write.")
    parser.add_argument("before", type=Path, help="a checkout of the other version")
    parser.add_argument("--capture", type=Path, help="a capture to compress besides")
    parser.add_argument("--profile", type=Path, help="the profile of its model")
    parser.add_argument("--codecs", help="only codecs whose names contain this")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    differing = count = 0
    with tempfile.TemporaryDirectory(prefix="kvpack-compare-") as name:
        folder, listed = Path(name), Path(name) / "jobs"
        wanted = [job for job in jobs(folder, given.capture, given.profile) if (given.codecs or "") in str(job[2])]
        listed.write_text("".join(json.dumps(job) + "\n" for job in wanted))
        both = [outcomes(checkout.resolve(), folder, listed) for checkout in (given.before, HERE.parent)]
        for lines in zip(*(work.stdout or () for work in both), strict=False):
            (label, before), (_, now) = map(json.loads, lines)
            count += 1
            if before != now:
                differing += 1
                print(f"DIFFERS: {label}: {before} before, {now} now")
        codes = [work.wait() for work in both]
    print(f"{count} of {len(wanted)} files compared, {differing} differ; exit codes {codes}")
    return int(differing > 0 or count != len(wanted) or any(codes))


if __name__ == "__main__":
    sys.exit(main())
