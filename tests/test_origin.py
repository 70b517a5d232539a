"""Format 1.1: files that are a part of a text, with their origin, by both decoders."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_decoder
from conftest import FIXTURES, SMALL, nmse
from profiles import TINY, tiny_capture
from test_container import assemble, taken_apart
from test_format import assert_same
from texts import text

from kvpack import jobs
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import CODECS, codec_named, prefix_stable
from kvpack.engine import CpuEngine
from kvpack.errors import FormatError, MismatchError, UnsupportedError, UsageError
from kvpack.formats.captures import layer_of
from kvpack.formats.source import Capture
from kvpack.jobs import KvpFile, decoded
from kvpack.jobs.opened import Opened
from kvpack.jobs.reader import keys_and_values
from kvpack.kvp import Container
from kvpack.kvp.features import written_version
from kvpack.kvp.header import Header
from kvpack.kvp.layout import pack_prologue, unpack_prologue
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile
from kvpack.store.objects import cut

Cli = Callable[..., Any]
GOLDENS = FIXTURES / "goldens" / "1.1"
ORIGIN = 100
"""Where the parts begin that these tests cut from captures of 160 tokens."""

FAMILIES = ["lossless", "zstd", "kivi-3", "turboquant-prod-2", "cachegen-4", "local-4"]
PROFILED = ["fisher-5", "aquakv-3", "kvtc-1"]


def part_of(capture: Capture, name: str, origin: int = ORIGIN) -> bytes:
    """A file of the rows from ``origin`` on, by the codec's variant for stores."""
    codec = prefix_stable(codec_named(name))
    profile = Profile.open(TINY) if Need.PROFILE in codec.traits.needs else None
    tokens = capture.read("tokens").view(np.int32)
    part = cut(capture, origin, len(tokens), {})
    job = jobs.prepare(part, codec, profile=profile, chunk_tokens=128, origin=origin, before=tokens[:origin])
    sink = io.BytesIO()
    next(jobs.compress_many([job]))(sink, None)
    return sink.getvalue()


def rows_of(data: bytes, name: str, before: np.ndarray | None) -> bytes:
    """What the file decodes to, laid out as its source."""
    profile = Profile.open(TINY) if name in PROFILED else None
    file = KvpFile(Container(memoryview(data)), profile, None, before)
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for task, arrays in decoded(CpuEngine(), file.tasks(keys_and_values)):
        for part, bits in zip(task.block.parts, arrays, strict=True):
            found.setdefault(part.tensor.name, []).append((part.first, bits))
    source = file.container.source
    pieces = [
        np.concatenate([bits for _, bits in sorted(found[spec.name], key=lambda one: one[0])], axis=1).tobytes()
        if layer_of(spec) is not None
        else file.read(spec.name).tobytes()
        for spec in source.tensors
    ]
    return len(source.raw).to_bytes(8, "little") + source.raw + b"".join(pieces)


@pytest.fixture
def tiny(tmp_path: Path) -> Capture:
    return Capture.open(tiny_capture(tmp_path / "tiny.safetensors"))


@pytest.mark.parametrize("name", [*FAMILIES, *PROFILED])
@pytest.mark.parametrize("origin", [0, 3, 100])
def test_both_decoders_agree(tiny: Capture, name: str, origin: int) -> None:
    data = part_of(tiny, name, origin)
    before = tiny.read("tokens").view(np.int32)[:origin]
    profile = TINY.read_bytes() if name in PROFILED else b""
    ours, theirs = rows_of(data, name, before), reference_decoder.decode(data, profile, before=before.tolist())
    assert_same(name, ours, theirs)
    assert struct.unpack_from("<HHI", data, 8) == (1, 1, 4)
    assert Container(memoryview(data)).header.origin == origin


@pytest.mark.parametrize("name", [*FAMILIES, *PROFILED])
def test_positions_count_from_the_beginning_of_the_text(tiny: Capture, name: str) -> None:
    """A part's rows come back about as near to the original as the same rows of the whole: by the right angles."""
    before = tiny.read("tokens").view(np.int32)[:ORIGIN]
    data, whole = part_of(tiny, name), part_of(tiny, name, 0)
    raw = rows_of(data, name, before)
    part_errors, errors = (errors_of(tiny, one, name, before) for one in (data, whole))
    assert all(a <= 1.5 * b for a, b in zip(part_errors, errors, strict=True))
    wrong = rows_of(data, name, before[::-1].copy())
    assert (wrong == raw) == (name != "fisher-5")  # which alone predicts from the tokens before


def errors_of(tiny: Capture, data: bytes, name: str, before: np.ndarray) -> list[float]:
    """The error of the rows from ``ORIGIN`` on of each tensor of keys or values."""
    container = Container(memoryview(data))
    raw, source, origin = rows_of(data, name, before), container.source, container.header.origin or 0
    found = []
    for spec in source.tensors[:4]:
        at = 8 + len(source.raw) + spec.start
        back = np.frombuffer(raw[at : at + spec.nbytes], np.uint16).reshape(spec.shape)[:, ORIGIN - origin :]
        found.append(nmse(to_float32(back, "BF16"), to_float32(tiny.read(spec.name)[:, ORIGIN:], "BF16")))
    return found


def test_a_part_of_a_text_is_not_decompressed_alone(tiny: Capture, cli: Cli, tmp_path: Path) -> None:
    for name in ("lossless", "fisher-5"):
        path = tmp_path / f"{name}.kvp"
        path.write_bytes(part_of(tiny, name))
        known = ["-D", TINY] if name in PROFILED else []
        result = cli("decompress", path, "-o", tmp_path / "x", *known)
        assert (result.code, (tmp_path / "x").exists()) == (5, False)
        assert "begins at token 100 of a text" in result.err
        assert "kvpack store get" in result.err
        tested = cli("decompress", "-t", path, *known)
        assert tested.code == (0 if name == "lossless" else 5)
        with pytest.raises(MismatchError, match="kvpack store get"):
            Opened(KvpFile.open(path)).to_tensors()
        shown = cli("inspect", "--check", path).out
        assert "1.1 (origin), written by kvpack" in shown
        assert "begins at token 100 of its text, and more tokens may follow" in shown
        report = json.loads(cli("inspect", "--json", path).out)
        assert (report["origin"], report["features"]) == (100, ["origin"])
    first = tmp_path / "first.kvp"
    first.write_bytes(part_of(tiny, "lossless", 0))
    assert cli("decompress", first, "-o", tmp_path / "x").code == 0
    assert (tmp_path / "x").read_bytes() == rows_of(first.read_bytes(), "lossless", None)


def test_files_without_it_have_no_field(cli: Cli, tmp_path: Path) -> None:
    assert cli("compress", SMALL, "-o", tmp_path / "x.kvp").code == 0
    container = Container.open(tmp_path / "x.kvp")
    assert "origin" not in json.loads(container.header.to_bytes())
    report = json.loads(cli("inspect", "--json", tmp_path / "x.kvp").out)
    assert report["origin"] is None


def test_an_origin_without_its_bit_is_refused_by_both_decoders(tiny: Capture) -> None:
    header, streams, index = taken_apart(part_of(tiny, "lossless"))
    lying = assemble(header.to_bytes(), streams, index)
    with pytest.raises(FormatError, match="uses origin, and its prologue does not say so"):
        Container(memoryview(lying))
    with pytest.raises(ValueError, match="origin"):
        reference_decoder.decode(lying)


def test_the_bit_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path) -> None:
    assert cli("compress", SMALL, "-o", tmp_path / "x.kvp").code == 0
    header, streams, index = taken_apart((tmp_path / "x.kvp").read_bytes())
    monkeypatch.setattr("test_container.pack_prologue", lambda deflated: pack_prologue(deflated, 4))
    data = assemble(header.to_bytes(), streams, index)
    assert reference_decoder.decode(data) == SMALL.read_bytes()
    (tmp_path / "y.kvp").write_bytes(data)
    assert cli("decompress", tmp_path / "y.kvp", "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == SMALL.read_bytes()


def test_a_reader_that_does_not_know_the_bit_refuses_it(tiny: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    prologue = part_of(tiny, "lossless")[:32]
    monkeypatch.setattr("kvpack.kvp.layout.KNOWN_CRITICAL", 1)
    with pytest.raises(UnsupportedError, match=r"bits 0x4\): upgrade kvpack"):
        unpack_prologue(prologue)
    assert written_version(4) == (1, 1)


@pytest.mark.parametrize("wrong", [-1, (1 << 40) + 1, 1.5, True, "7", None, [3]])
def test_an_origin_that_is_none_is_refused(tiny: Capture, wrong: object) -> None:
    header, _, _ = taken_apart(part_of(tiny, "lossless"))
    document = {**json.loads(header.to_bytes()), "origin": wrong}
    with pytest.raises(FormatError, match="'origin'"):
        Header.from_bytes(json.dumps(document).encode())


def test_codecs_that_look_at_what_follows_are_refused() -> None:
    for name in ("kivi-3", "local-4"):
        with pytest.raises(UsageError, match=f"{name} codes tokens by what follows"):
            jobs.prepare(text([1, 2, 3]), CODECS[name], origin=0)


def test_fisher_needs_the_tokens_before(tiny: Capture) -> None:
    data = part_of(tiny, "fisher-5")
    for before in (None, np.zeros(99, np.int32)):
        with pytest.raises(MismatchError, match="begins at token 100"):
            rows_of(data, "fisher-5", before)
    with pytest.raises(ValueError, match="tokens before"):
        reference_decoder.decode(data, TINY.read_bytes())


@pytest.mark.parametrize("name", FAMILIES[2:])
def test_hints_change_nothing(name: str) -> None:
    """Probes and attention mass come from later tokens: without them a part has the same bytes."""
    whole = Capture.open(SMALL)
    tensors = {
        key: (entry.dtype, whole.read(key))
        for key, entry in whole.tensors.items()
        if layer_of(entry) is not None or key == "tokens"
    }
    bare = Capture.of("bare", tensors, whole.metadata)
    assert part_of(whole, name) == part_of(bare, name)


@pytest.mark.parametrize("name", ["lossless", "fisher-5", "local-4"])
def test_goldens_decode_alike_by_both_decoders(tiny: Capture, name: str) -> None:
    data = (GOLDENS / f"origin-{name}.kvp").read_bytes()
    before = tiny.read("tokens").view(np.int32)[:ORIGIN]
    profile = TINY.read_bytes() if name in PROFILED else b""
    ours = rows_of(data, name, before)
    assert_same(name, ours, reference_decoder.decode(data, profile, before=before.tolist()))
    if name == "lossless":
        digest = (GOLDENS / "origin-lossless.sha256").read_text().strip()
        assert hashlib.sha256(ours).hexdigest() == digest
    golden, today = Container(memoryview(data)), Container(memoryview(part_of(tiny, name)))
    assert golden.header == today.header
    assert today.size == pytest.approx(golden.size, rel=0.01)
