"""Makes files that break the rules while all their checksums are right, and runs kvpack on them."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvpack.kvp.layout import Record, pack_footer, pack_index, pack_prologue
from kvpack.numerics.checksum import checksum
from kvpack.profiles import write_profile

ROOT = Path(__file__).parent.parent.parent


def stage(name: str, version: int = 1, **configuration: Any) -> dict[str, Any]:
    return {"name": name, "version": version, "configuration": configuration}


def codec(*stages: dict[str, Any], name: str = "forged", stacked: bool = False) -> dict[str, Any]:
    return {"name": name, "stacked": stacked, "keys": [*stages], "values": [*stages]}


LOSSLESS = codec(stage("float_split"), stage("rans", 2), name="lossless")


def entry(dtype: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [start, stop]}


def safetensors(header: Mapping[str, Any] | str, data: bytes = b"") -> bytes:
    """A safetensors file with this header, given as what it holds or as its very text."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data


Part = tuple[int, int, Sequence[tuple[str, bytes]]]
"""A part's codec, digest and streams."""


def kvp(source: Mapping[str, Any] | str, codecs: Sequence[Any], parts: Sequence[Part] = (), **fields: Any) -> bytes:
    """A ``.kvp`` file of these parts. ``fields`` replace or add fields of its header."""
    names = sorted({name for _, _, streams in parts for name, _ in streams})
    document = {
        "writer": "attack",
        "codecs": [*codecs],
        "chunk_tokens": 2048,
        "lossless": False,
        "streams": names,
        "profile": None,
        "dropped": [],
        "source": source if isinstance(source, str) else json.dumps(source),
        **fields,
    }
    records = [
        (number, digest, [Record(names.index(name), len(data), checksum(data)) for name, data in streams])
        for number, digest, streams in parts
    ]
    body = b"".join(data for _, _, streams in parts for _, data in streams)
    return assembled(json.dumps(document).encode(), body, pack_index(records))


def assembled(header: bytes, body: bytes, index: bytes, *, deflated: bool = False, critical: int = 0) -> bytes:
    """A ``.kvp`` file of a header (deflated here unless it is already), streams, and a deflated index.

    Its prologue has the bits ``critical`` of features that a reader must know.
    """
    import zlib

    header = header if deflated else zlib.compress(header, 9)
    prologue = pack_prologue(header, critical)
    start = prologue + header + body
    return start + index + pack_footer(index, len(start), prologue)


def profile(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    sink = io.BytesIO()
    write_profile(arrays, {}, sink)
    path.write_bytes(sink.getvalue())
    return path


@dataclass(frozen=True)
class Outcome:
    """How a command of a process of its own ended, in how many seconds, and how many megabytes it had at most."""

    code: int
    out: str
    err: str
    seconds: float
    megabytes: float


_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.monotonic()
try:
    done = subprocess.run(sys.argv[2:], capture_output=True, timeout=float(sys.argv[1]))
    code, out, err = done.returncode, done.stdout, done.stderr
except subprocess.TimeoutExpired:
    code, out, err = -9, b"", b""
used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([code, out.decode(), err.decode(), time.monotonic() - start, used]))
"""
"""A small process that starts the command, because a process counts the memory of the one that it was forked from."""


def run(*arguments: object, folder: Path, limit: float = 60) -> Outcome:
    """Run ``kvpack`` in a process of its own. It is killed after ``limit`` seconds, and its exit code is then -9."""
    command = [sys.executable, "-m", "kvpack", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCHER, str(limit), *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return Outcome(*json.loads(done.stdout))
