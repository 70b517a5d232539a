"""``--rm`` deletes an input only if the very path that decompresses gives every byte of it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from forge import entry, safetensors

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.engine import CpuEngine
from kvpack.errors import KvpackError
from kvpack.formats.sink import SafetensorsSink

Cli = Callable[..., Any]


@pytest.mark.parametrize("shape", [(1 << 62, 0, 1 << 62), (0, 1 << 62, 2), (1 << 61, 0)], ids=str)
def test_a_shape_that_cannot_be_restored(cli: Cli, tmp_path: Path, shape: tuple[int, ...]) -> None:
    """It used to be compressed, and the original deleted; the file could not be decompressed."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"a": entry("F32", shape, 0, 0)}))
    found = cli("compress", "--rm", path)
    assert (found.code, found.err.count("\n")) == (4, 1), found.err
    assert path.exists()
    assert not Path(f"{path}.kvp").exists()


@pytest.mark.parametrize("shape", [(0,), (1 << 31, 130, 0), (0, 1 << 40), (7, 0, 1 << 50), ()], ids=str)
def test_an_empty_shape_that_can_be_restored(cli: Cli, tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "x.safetensors"
    data = safetensors({"a": entry("F32", shape, 0, 0 if shape else 4)}, b"" if shape else b"\0\0\0\1")
    path.write_bytes(data)
    assert cli("verify", path, path).code == 0
    assert cli("compress", "--rm", path).code == 0
    assert not path.exists()
    assert cli("decompress", f"{path}.kvp").code == 0
    assert path.read_bytes() == data


LOSSY = [("-c", "kivi-4"), ("--ratio", 2), ("--drop", "tokens"), ("--drop-probes",), ("-c", "kivi-4", "--drop", "tok*")]


@pytest.mark.parametrize("options", LOSSY, ids=str)
def test_an_output_that_is_not_the_whole_original(cli: Cli, small: Path, options: tuple[object, ...]) -> None:
    refused = cli("compress", "--rm", *options, small)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "--lossy-ok" in refused.err
    assert small.exists()
    assert not Path(f"{small}.kvp").exists()
    assert cli("compress", "--rm", "--lossy-ok", *options, small).code == 0
    assert not small.exists()
    assert cli("decompress", f"{small}.kvp").code == 0
    assert cli("compress", "--lossy-ok", small).code == 2


def test_a_fault_of_decompressing_keeps_the_input(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is the one of ``decompress``: a fault that only writing has is found too."""
    write = SafetensorsSink.write

    def crooked(sink: SafetensorsSink, part: Any, bits: Any) -> int:
        return write(sink, part, np.roll(bits, 1, 1) if part.tensor.layer == 29 else bits)

    monkeypatch.setattr(SafetensorsSink, "write", crooked)
    found = cli("compress", "--rm", small)
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert "kept" in found.err
    assert small.exists()


def test_an_input_that_changes_meanwhile_is_kept(cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = jobs.require_restorable

    def later(file: Any, original: Path | None, engine: Any) -> None:
        assert original is not None
        data = bytearray(original.read_bytes())
        data[-1] ^= 1
        original.write_bytes(bytes(data))
        check(file, original, engine)

    monkeypatch.setattr(jobs, "require_restorable", later)
    found = cli("compress", "--rm", small)
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert small.exists()


def test_what_is_compared_is_every_byte(small: Path, tmp_path: Path) -> None:
    packed = tmp_path / "x.kvp"
    with packed.open("wb") as sink:
        output: BinaryIO = sink
        jobs.compress(small, output, CODECS["lossless"])
    file = jobs.KvpFile.open(packed)
    jobs.require_restorable(file, small, CpuEngine())
    data = small.read_bytes()
    for changed in (data[:-1], data + b"\0", data[:9] + b"~" + data[10:], data[:-1] + bytes([data[-1] ^ 1])):
        other = tmp_path / "other.safetensors"
        other.write_bytes(changed)
        with pytest.raises(KvpackError, match="decompressing it gives"):
            jobs.require_restorable(file, other, CpuEngine())
