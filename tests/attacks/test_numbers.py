"""Captures of any numbers: signalling NaN, infinities, and numbers whose sums or rotations are beyond float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import entry, run, safetensors

PATTERNS = {
    "BF16": [0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7F81, 0xFFC0, 0x0001, 0x8000],
    "F16": [0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0xFE00, 0x0001, 0x8000],
    "F32": [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x00000001, 0x80000000],
}
"""The largest numbers, infinities, a signalling and a quiet NaN, the smallest number, and minus zero."""


def capture(path: Path, dtype: str, which: list[int]) -> Path:
    """Two layers, 12 tokens and some probe queries, ordinary numbers but for a few."""
    size, rng = {"BF16": 2, "F16": 2, "F32": 4}[dtype], np.random.default_rng(0)
    shapes = {f"layers.{i}.{kind}": [1, 12, 8] for i in range(2) for kind in ("keys", "values")}
    shapes |= {f"queries.{i}": [2, 3, 8] for i in range(2)}
    header: dict[str, Any] = {"__metadata__": {"rope": json.dumps({"rope_theta": 10000.0})}}
    data, at = b"", 0
    for name, shape in shapes.items():
        bits = rng.integers(0x3C00, 0x3FFF, int(np.prod(shape)), f"u{size}")
        if size == 4:
            bits = bits << np.uint32(16)
        bits[3 : 3 + 5 * len(which) : 5] = which
        data += bits.tobytes()
        header[name] = entry(dtype, shape, at, len(data))
        at = len(data)
    path.write_bytes(safetensors(header, data))
    return path


def assert_only_carried(printed: str) -> None:
    """Check that nothing is said but which parts are lossless because the codec cannot represent them."""
    assert all(line.startswith("kvpack: ") and "cannot represent" in line for line in printed.splitlines()), printed


CASES = {"every": (0, 1, 2, 3, 4, 5, 6, 7), "finite": (0, 1, 6, 7)}


@pytest.mark.parametrize("dtype", PATTERNS)
@pytest.mark.parametrize("which", CASES, ids=str)
def test_nothing_is_said_of_any_number(cli: Any, tmp_path: Path, dtype: str, which: str) -> None:
    """Where numbers overflowed or were signalling NaN, ``verify`` and encoders printed numpy's warnings. By fuzzing."""
    source = capture(tmp_path / "x.safetensors", dtype, [PATTERNS[dtype][i] for i in CASES[which]])
    for name in ("lossless", "turboquant-prod-2", "cachegen-4", "local-4"):
        packed = tmp_path / f"{name}.kvp"
        found = cli("compress", source, "-c", name, "-o", packed)
        assert found.code == 0, found.err
        assert_only_carried(found.err)
        found = cli("verify", "--json", source, packed)
        assert (found.code, found.err) == (0, ""), found.err
        json.loads(found.out)


def test_nothing_is_printed_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = capture(tmp_path / "x.safetensors", "F32", PATTERNS["F32"])
    for command in (["compress", source, "-c", "local-4"], ["verify", source, f"{source}.kvp"]):
        found = run(*command, folder=tmp_path)
        assert found.code == 0, found.err
        assert_only_carried(found.err)
