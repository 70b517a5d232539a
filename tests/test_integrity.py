"""``verify FILE`` finds every damage, ``decompress --salvage`` saves all the rest and says what is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, Result, one_of_each_family
from hypothesis import given
from hypothesis import strategies as st
from profiles import profile_for, tiny_capture

from kvpack import jobs
from kvpack.codecs.recipes import CODECS, codec_names
from kvpack.errors import CorruptError, KvpackError
from kvpack.formats.safetensors import TensorFile, parse_header
from kvpack.formats.source import Capture
from kvpack.jobs.integrity import MISSING
from kvpack.kvp import Container
from kvpack.kvp.layout import FOOTER, PROLOGUE
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

Cli = Callable[..., Result]
GOLDENS = FIXTURES / "goldens"
NAMES = [name for name in codec_names() if name != "replay"]


def compressed(folder: Path, codec: str) -> tuple[Path, Profile | None]:
    """Compress the tiny capture in chunks of 128 tokens, of which it has two."""
    source = tiny_capture(folder / "tiny.safetensors")
    profile = profile_for(source, CODECS[codec])
    target = folder / "tiny.kvp"
    with target.open("wb") as file:
        jobs.compress(source, file, CODECS[codec], profile=profile, chunk_tokens=128)
    return target, profile


def saved_from(
    path: Path, profile: Profile | None, selection: jobs.Selection | None = None
) -> tuple[bytes, jobs.Salvaged]:
    """Return what is salvaged of a file, and the report."""
    output = io.BytesIO()
    report = jobs.salvage(jobs.KvpFile.open(path, profile, damaged=True), output, selection)
    return output.getvalue(), report


def opened(data: bytes) -> Capture:
    """Open a capture in memory."""
    length = int.from_bytes(data[:8], "little")
    return Capture(TensorFile("saved", parse_header(data[8 : 8 + length]), memoryview(data)))


@pytest.mark.parametrize("codec", one_of_each_family(NAMES))
def test_a_damaged_block_is_all_that_is_lost(tmp_path: Path, codec: str) -> None:
    path, profile = compressed(tmp_path, codec)
    sound = jobs.examine(jobs.KvpFile.open(path, profile))
    file = jobs.KvpFile.open(path, profile)
    assert (sound.damage, sound.undecoded) == ([], 0)
    assert sound.exact + sound.lossy == len(file.container.parts)
    whole, report = saved_from(path, profile)
    assert (report.damage, report.whole, report.left_out) == ([], 160, [])
    plain = io.BytesIO()
    jobs.decompress(file, plain)
    assert whole == plain.getvalue()

    data = bytearray(path.read_bytes())
    entry = next(entry for entry in file.container.parts if entry.spec.first == 128)
    data[entry.streams[0][1]] ^= 64
    path.write_bytes(data)
    (damage,) = jobs.examine(jobs.KvpFile.open(path, profile)).damage
    assert damage.parts[0] == entry.spec.label
    assert entry.spec.label in damage.reason
    saved, report = saved_from(path, profile)
    assert ([found.parts for found in report.damage], report.whole) == ([damage.parts], 128)
    before, after = opened(whole), opened(saved)
    assert json.loads(after.metadata[MISSING]) == list(damage.parts)
    for name in before.tensors:
        expected, got = before.read(name), after.read(name)
        if f"{name}[128:160]" in damage.parts:
            assert np.isnan(to_float32(got[:, 128:], "BF16")).all()
            expected, got = expected[:, :128], got[:, :128]
        assert np.array_equal(expected, got)
    cut, report = saved_from(path, profile, jobs.Selection(tokens=(0, 128)))
    assert (report.damage, MISSING in opened(cut).metadata) == ([], False)


@pytest.mark.parametrize("codec", ["fisher-4", "kvtc-1"])
def test_without_the_profile_checksums_are_compared(tmp_path: Path, codec: str) -> None:
    path, _ = compressed(tmp_path, codec)
    found = jobs.examine(jobs.KvpFile.open(path))
    assert found.undecoded == 8
    assert (found.lacking, found.damage, found.exact) == ("a profile", [], len(_others(path)))
    entry = [entry for entry in Container.open(path).parts if entry.streams][1]
    data = bytearray(path.read_bytes())
    data[entry.streams[-1][1]] ^= 1
    path.write_bytes(data)
    (damage,) = jobs.examine(jobs.KvpFile.open(path)).damage
    assert damage.parts == (entry.spec.label,)
    with pytest.raises(KvpackError, match="needs the profile"):
        saved_from(path, None)


def _others(path: Path) -> list[str]:
    return [entry.spec.label for entry in Container.open(path).parts if entry.spec.tensor.layer is None]


def test_damaged_token_ids_take_what_needs_them(tmp_path: Path) -> None:
    path, profile = compressed(tmp_path, "fisher-4")
    entry = next(entry for entry in Container.open(path).parts if entry.spec.label == "tokens")
    data = bytearray(path.read_bytes())
    data[entry.streams[0][1] + 2] ^= 1
    path.write_bytes(data)
    found = jobs.examine(jobs.KvpFile.open(path, profile))
    assert ([damage.parts for damage in found.damage], found.undecoded) == ([("tokens",)], 8)
    with pytest.raises(CorruptError, match="nothing can be salvaged: needs the token ids, which are damaged"):
        saved_from(path, profile, jobs.Selection(layers=frozenset([0])))


def _ends(path: Path) -> tuple[int, int]:
    """Return where the streams of a file begin and where its index begins."""
    container = Container.open(path)
    return container.header_size, container.size - container.index_size


@pytest.mark.parametrize("name", ["lossless", "kivi-4"])
def test_ends_are_made_anew(tmp_path: Path, name: str) -> None:
    """Every byte of prologue and footer, bytes behind the end, and a footer that is cut off."""
    path, profile = compressed(tmp_path, name)
    sound = path.read_bytes()
    whole, _ = saved_from(path, profile)
    places = [*range(PROLOGUE.size), *range(len(sound) - FOOTER.size, len(sound))]
    cases = [sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :] for at in places]
    cases += [sound[:-cut] for cut in range(1, FOOTER.size + 1)]
    cases += [sound + b"x" * extra for extra in (1, 47, 48, 5000)] + [sound + sound[-FOOTER.size :]]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(KvpackError):
            jobs.KvpFile.open(path)
        found = jobs.KvpFile.open(path, damaged=True)
        assert found.container.damage
        saved, report = saved_from(path, profile)
        assert (saved, report.damage) == (whole, [])


def test_without_header_or_index_nothing_is_saved(tmp_path: Path) -> None:
    path, _ = compressed(tmp_path, "lossless")
    sound = path.read_bytes()
    start, index = _ends(path)
    for data, message in (
        (sound[: PROLOGUE.size + 40] + b"??" + sound[PROLOGUE.size + 42 :], "nothing can be salvaged"),
        (sound[:index], "no whole index"),
        (sound[: index + 20], "no whole index"),
        (sound[: start // 2], "nothing can be salvaged"),
        (b"", "nothing can be salvaged"),
        (b"\x89KVP", "nothing can be salvaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(KvpackError, match=message):
            jobs.KvpFile.open(path, damaged=True)


@given(st.data())
def test_any_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A flipped bit is found, and what is salvaged is the original but for what the report names."""
    golden = GOLDENS / "1.0" / "lossless.kvp"
    sound = golden.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(sound) - 1))
    path = tmp_path_factory.getbasetemp() / "bit.kvp"
    changed = bytearray(sound)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    with suppress(KvpackError):
        assert jobs.examine(jobs.KvpFile.open(path)).damage
    try:
        saved, report = saved_from(path, None)
    except KvpackError:
        return
    whole, _ = saved_from(golden, None)
    before, after = opened(whole), opened(saved)
    lost = [label for damage in report.damage for label in damage.parts]
    for name in before.tensors:
        if not any(label.split("[")[0] == name for label in lost):
            assert np.array_equal(before.read(name), after.read(name))


def test_from_the_shell(cli: Cli, tmp_path: Path) -> None:
    path, _ = compressed(tmp_path, "lossless")
    source, out = tmp_path / "tiny.safetensors", tmp_path / "out"
    assert "are those of the original" in cli("verify", path).out
    assert "no checksums of its data" in cli("verify", source).out
    assert cli("verify", source, "--bit-exact").code == 2
    assert json.loads(cli("verify", path, "--json").out)["damage"] == []
    assert cli("decompress", "--salvage", path, "-o", out).code == 0
    assert out.read_bytes() == source.read_bytes()
    entries = Container.open(path).parts
    data = bytearray(path.read_bytes())
    for entry in entries[4:6]:
        data[entry.streams[0][1]] ^= 1
    path.write_bytes(data)
    done = cli("verify", path)
    assert (done.code, done.err.count("\n")) == (4, 3)
    assert all(f"{path}: corrupt: the checksum of {entry.spec.label}" in done.err for entry in entries[4:6])
    for command in (("decompress", "-t", path), ("inspect", "--check", path)):
        done = cli(*command)
        assert (done.code, done.err.count(str(path)), done.err.count(entries[4].spec.label)) == (4, 1, 1), done.err
    assert cli("decompress", path, "-o", out, "-f").code == 4
    done = cli("decompress", "--salvage", path, "-o", out, "-f")
    assert (done.code, done.out) == (4, f"{path} -> {out} (salvaged)\n")
    assert "every layer is whole up to token 128: --tokens 0:128 gives these rows alone" in done.err
    assert cli("decompress", "--salvage", path, "-o", "-").raw == out.read_bytes()
    row = json.loads(cli("decompress", "--salvage", path, "-o", out, "-f", "--json").out)
    assert (row["whole_tokens"], row["exit_code"]) == (128, 4)
    assert [damage["parts"] for damage in row["missing"]] == [[entry.spec.label] for entry in entries[4:6]]
    assert cli("decompress", "--salvage", "--rm", path).code == 2
