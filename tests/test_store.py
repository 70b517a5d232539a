"""A store of prefixes: names, chains, the longest prefix, identity, sharing, and what is said of differing bits."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import MODEL, holds, text

from kvpack import jobs
from kvpack.cache.metadata import Schedule
from kvpack.codecs.recipes import CODECS, codec_named, prefix_stable
from kvpack.errors import FormatError, MismatchError, NotStoredError, UnsupportedError, UsageError
from kvpack.formats.safetensors import TensorFile, parse_header
from kvpack.formats.source import Capture
from kvpack.jobs import KvpFile
from kvpack.store import Fetched, Prompt, Store, Stored, collect, get, put, report, verify
from kvpack.store.keys import kind_name, object_name, object_names
from kvpack.store.schedule import MADE, Piece, joined

LOSSLESS = CODECS["lossless"]
IDS = st.lists(st.integers(0, 49151), min_size=1, max_size=40)
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)
SEGMENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 150)), min_size=1, max_size=4)
"""Texts that often share beginnings: runs of few sources."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def stored(store: Store, capture: Capture, **options: Any) -> Stored:
    return put(store, capture, LOSSLESS, window=128, **options)


def fetch(store: Store, prompt: Prompt, **options: Any) -> tuple[Fetched, Capture]:
    sink = io.BytesIO()
    done = get(store, prompt, options.pop("codec", LOSSLESS), sink, **options)
    raw = sink.getvalue()
    length = int.from_bytes(raw[:8], "little")
    return done, Capture(TensorFile("fetched", parse_header(raw[8 : 8 + length]), memoryview(raw)))


def prompt_of(capture: Capture, **options: bool) -> Prompt:
    return Prompt.of_cache(capture, capture.metadata, **options)


def made_up(segments: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of a text: each segment is so many tokens of one of three sources, from where the text stands."""
    tokens: list[int] = []
    for source, count in segments:
        tokens += [(source * 7919 + at) % 49152 for at in range(len(tokens), len(tokens) + count)]
    return tokens


def shared(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


@given(key=st.binary(min_size=32, max_size=32), parent=HEX, made=st.sampled_from(MADE), tokens=IDS)
def test_names_of_all_prefixes_come_in_one_pass(key: bytes, parent: str, made: str, tokens: list[int]) -> None:
    ids = np.array(tokens, np.int32)
    every = list(object_names(key, parent, made, ids))
    assert every == [object_name(key, parent, made, ids[:n]) for n in range(1, len(ids) + 1)]
    assert len(set(every)) == len(every)


@given(key=st.binary(min_size=32, max_size=32), parent=HEX, tokens=IDS, data=st.data())
def test_a_name_depends_on_all_that_it_stands_for(key: bytes, parent: str, tokens: list[int], data: Any) -> None:
    ids = np.array(tokens, np.int32)
    names = {object_name(key, parent, made, ids) for made in MADE}
    assert len(names) == len(MADE)
    other = ids.copy()
    other[data.draw(st.integers(0, len(ids) - 1))] ^= 1 << data.draw(st.integers(0, 30))
    flipped = bytearray(bytes.fromhex(parent))
    flipped[data.draw(st.integers(0, 31))] ^= 1 << data.draw(st.integers(0, 7))
    names |= {object_name(key, parent, "prefill", other), object_name(key, flipped.hex(), "prefill", ids)}
    names |= {object_name(bytes(32) if any(key) else b"x" * 32, parent, "prefill", ids), kind_name(key, tokens)}
    assert len(names) == len(MADE) + 4


@given(texts=st.lists(SEGMENTS, min_size=1, max_size=5), prompts=st.lists(SEGMENTS, min_size=1, max_size=3))
def test_the_longest_prefix_of_any_stored_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Any], prompts: list[Any]
) -> None:
    """Bit for bit and to the token, in whatever order texts came, and every text that was put comes back whole."""
    store = Store.create(tmp_path_factory.mktemp("store") / "s")
    every = [made_up(segments) for segments in texts]
    for tokens in every:
        stored(store, text(tokens))
    assert not verify(store.path).damage
    for tokens in [*every, *map(made_up, prompts)]:
        expected = max(shared(tokens, other) for other in every)
        for prompt in (prompt_of(text(tokens)), Prompt.of_tokens(tokens)):
            if not expected:
                with pytest.raises(NotStoredError):
                    fetch(store, prompt)
                continue
            done, found = fetch(store, prompt)
            assert (done.held, done.tokens, done.notes) == (expected, len(tokens), ())
            assert holds(found, tokens[:expected])


@given(segments=SEGMENTS, others=st.lists(SEGMENTS, max_size=3))
def test_putting_twice_writes_nothing(
    tmp_path_factory: pytest.TempPathFactory, segments: Any, others: list[Any]
) -> None:
    store = Store.create(tmp_path_factory.mktemp("store") / "s")
    tokens = made_up(segments)
    stored(store, text(tokens))
    for other in others:
        stored(store, text(made_up(other)))
    again = stored(store, text(tokens))
    assert (again.shared, again.written, again.differing, again.repaired) == (len(tokens), 0, [], [])


@given(
    chunks=st.lists(st.integers(1, 200), max_size=4),
    decode=st.integers(0, 200),
    cuts=st.lists(st.integers(1, 200), min_size=1, max_size=6),
)
def test_pieces_of_a_schedule_join_to_the_schedule(chunks: list[int], decode: int, cuts: list[int]) -> None:
    schedule = Schedule(tuple(chunks), decode)
    places = [0, *(int(at) for at in np.cumsum(cuts) if at < schedule.tokens), schedule.tokens]
    pieces = [Piece.of(schedule, start, stop) for start, stop in itertools.pairwise(places) if stop > start]
    assert joined(pieces) == {"prefill": chunks, "decode": decode}
    for piece in pieces:
        count = sum(piece.prefill) + piece.decode
        assert Piece.from_json(json.loads(json.dumps(piece.to_json())), count) == piece
        assert Piece.from_json(piece.to_json(), count + 1) is None


def test_prefilled_tokens_behind_decode_steps_have_no_schedule() -> None:
    assert joined([Piece((), 3, False), Piece((4,), 0, False)]) is None
    assert joined([Piece((4,), 0, False), None]) is None


def test_a_prompt_that_many_chats_share_is_stored_once(store: Store) -> None:
    """Also where it ends within a window: the second chat cuts it there, and the others go on from it."""
    prompt = list(range(5000, 5330))
    chats = [prompt + [100 * i + at for at in range(60 + 20 * i)] for i in range(6)]
    results = [stored(store, text(tokens)) for tokens in chats]
    assert [done.shared for done in results] == [0, 256, 330, 330, 330, 330]
    found = report(store)
    assert sum(len(tokens) - 330 for tokens in chats) + 330 + 74 == found.tokens
    assert [branch.followers for branch in found.branches] == [2, 5]
    assert found.saved > 0
    for tokens in chats:
        assert holds(fetch(store, Prompt.of_tokens(tokens))[1], tokens)


def test_twenty_chats_take_little_more_than_one_prompt_and_their_tails(store: Store) -> None:
    """The prompt's end lies within a window. ``tests/benchmarks/store_sharing.py`` measures it with a real model."""
    prompt = list(range(1100))
    chats = [prompt + [2000 * (i + 1) + at for at in range(40 + 24 * i)] for i in range(20)]
    for tokens in chats:
        put(store, text(tokens), LOSSLESS)

    def packed(tokens: list[int]) -> int:
        sink = io.BytesIO()
        jobs.compress(text(tokens), sink, LOSSLESS)
        return len(sink.getvalue())

    one = packed(prompt)
    header = packed(prompt[:1])
    tails = sum(packed(tokens) - one + header for tokens in chats)
    assert report(store).bytes < 1.15 * (one + tails)


def test_short_ends_are_not_continued(store: Store) -> None:
    """A chat that grows by a few tokens would otherwise become a chain of tiny objects."""
    tokens = list(range(200))
    stored(store, text(tokens[:138]))
    done = stored(store, text(tokens))
    assert (done.shared, done.objects, done.written) == (128, 2, 1)
    stored(store, text(tokens[:128] + [7] * 70))
    grown = stored(store, text(tokens[:128] + [7] * 70 + [8] * 20))
    assert (grown.shared, grown.objects) == (198, 3)


IDENTITIES: dict[str, dict[str, Any]] = {
    "weights": {"model": {**MODEL, "weights_sha256": "6" * 64}},
    "model": {"model": {**MODEL, "num_hidden_layers": 3}},
    "positions": {"rope": {"rope_theta": 20000.0}},
    "no positions": {"rope": None},
    "adapters": {"adapters": [{"sha256": "1" * 64}]},
    "tokenizer": {"tokenizer": {"sha256": "2" * 64}},
    "dtype": {"dtype": "float16"},
    "attention": {"attention": {"scale": 0.5}},
    "classes": {"layer_classes": ["DynamicLayer"]},
}


@pytest.mark.parametrize("changed", IDENTITIES.values(), ids=IDENTITIES)
def test_another_identity_is_a_miss(store: Store, changed: dict[str, Any]) -> None:
    tokens = made_up([(0, 140)])
    stored(store, text(tokens))
    other = text(tokens, **changed)
    with pytest.raises(NotStoredError) as caught:
        fetch(store, prompt_of(other))
    assert caught.value.exit_code == 7
    assert stored(store, other).shared == 0
    assert fetch(store, prompt_of(other))[0].held == 140
    with pytest.raises(UsageError, match="--kind"):
        fetch(store, Prompt.of_tokens(tokens))
    kinds = {document["identity"]["model"]["weights_sha256"]: name for name, document in store.kinds()}
    for name in kinds.values():
        assert fetch(store, Prompt.of_tokens(tokens), kind=name[:12])[0].kind == name


def test_the_name_of_a_model_is_no_identity(store: Store) -> None:
    tokens = made_up([(0, 140)])
    stored(store, text(tokens))
    assert stored(store, text(tokens, model={**MODEL, "name": "renamed"})).written == 0


def test_other_layers_are_another_identity(store: Store) -> None:
    tokens = made_up([(0, 50)])
    whole = text(tokens)
    fewer = {name: (entry.dtype, whole.read(name)) for name, entry in whole.tensors.items() if "layers.1" not in name}
    stored(store, whole)
    with pytest.raises(NotStoredError):
        fetch(store, prompt_of(Capture.of("x", fewer, whole.metadata)))


def test_a_recipe_of_its_own_shares_nothing(store: Store) -> None:
    tokens = made_up([(0, 300)])
    stored(store, text(tokens))
    assert put(store, text(tokens), LOSSLESS, window=256).shared == 0
    assert put(store, text(tokens), CODECS["zstd"], window=128).shared == 0
    done, found = fetch(store, Prompt.of_tokens(tokens))
    assert (done.held, done.objects, done.codec) == (300, 2, "lossless")
    assert fetch(store, Prompt.of_tokens(tokens), codec=CODECS["zstd"])[0].codec == "zstd"
    with pytest.raises(NotStoredError, match="it has caches by lossless, zstd"):
        fetch(store, Prompt.of_tokens(tokens), codec=CODECS["turboquant-3"])
    assert holds(found, tokens)


def test_what_decode_steps_made_is_not_what_a_prefill_made(store: Store) -> None:
    tokens = made_up([(0, 400)])
    generated, prefilled = text(tokens, decode=100, salt=1), text(tokens)
    stored(store, generated)
    done, found = fetch(store, Prompt.of_tokens(tokens))
    assert (done.held, done.schedule) == (300, {"prefill": [300], "decode": 0})
    assert holds(found, tokens[:300], salt=1)
    done, _ = fetch(store, Prompt.of_tokens(tokens, any_way=True))
    assert (done.held, done.schedule) == (400, {"prefill": [300], "decode": 100})
    assert stored(store, prefilled).shared == 256
    assert fetch(store, prompt_of(generated))[0].schedule == {"prefill": [300], "decode": 100}
    assert fetch(store, prompt_of(prefilled))[0].schedule == {"prefill": [400], "decode": 0}


def test_captures_that_do_not_say_how_they_were_made_are_apart(store: Store) -> None:
    tokens = made_up([(0, 200)])
    stored(store, text(tokens, decode=None))
    wrong = text(tokens, schedule={"prefill": [100], "decode": 0})
    for prompt in (Prompt.of_tokens(tokens), prompt_of(text(tokens))):
        with pytest.raises(NotStoredError):
            fetch(store, prompt)
    assert stored(store, wrong).written == 0
    done, found = fetch(store, prompt_of(wrong))
    assert (done.held, done.schedule) == (200, None)
    assert "schedule" not in found.metadata
    assert fetch(store, Prompt.of_tokens(tokens, any_way=True))[0].held == 200


def test_chunks_of_the_prefill_are_told_and_share(store: Store) -> None:
    tokens = made_up([(0, 400)])
    stored(store, text(tokens, chunks=[150, 250]))
    assert stored(store, text(tokens)).written == 0
    done, found = fetch(store, Prompt.of_tokens(tokens[:390]))
    assert done.schedule == {"prefill": [150, 240], "decode": 0}
    assert json.loads(found.metadata["schedule"]) == done.schedule


def test_the_first_bits_stay(store: Store) -> None:
    tokens = made_up([(0, 300)])
    stored(store, text(tokens))
    done = stored(store, text(tokens, salt=1))
    assert (done.written, done.differing) == (0, [(0, 128), (128, 256), (256, 300)])
    assert holds(fetch(store, Prompt.of_tokens(tokens))[1], tokens)


def test_the_metadata_of_a_prefix_are_a_captures(store: Store) -> None:
    whole = text(made_up([(0, 200)]), attention={"scale": 0.25, "mass_window": 3, "probes": 9}, versions={"torch": "1"})
    stored(store, whole)
    found = fetch(store, prompt_of(whole))[1].metadata
    assert {name: json.loads(value) for name, value in found.items()} == {
        "kvpack_capture_version": 1,
        "model": MODEL,
        "rope": {"rope_theta": 10000.0},
        "dtype": "bfloat16",
        "attention": {"scale": 0.25},
        "versions": {"torch": "1"},
        "schedule": {"prefill": [200], "decode": 0},
    }


def test_what_cannot_be_stored_is_refused_before_anything_is_written(store: Store) -> None:
    tokens = made_up([(0, 140)])
    whole = text(tokens)
    every = {name: (entry.dtype, whole.read(name)) for name, entry in whole.tensors.items()}
    nameless = {name: entry for name, entry in every.items() if name != "tokens"}
    ragged = {**every, "layers.0.keys": ("BF16", every["layers.0.keys"][1][:, :100])}
    for error, capture in (
        (FormatError, Capture.of("x", nameless, whole.metadata)),
        (FormatError, Capture.of("x", {"tokens": every["tokens"]}, whole.metadata)),
        (UnsupportedError, Capture.of("x", ragged, whole.metadata)),
        (MismatchError, text(tokens, model={"name": "x"})),
        (MismatchError, text(tokens, lossy="fisher-5-prefix")),
    ):
        with pytest.raises(error, match=r"^(x|text): "):
            stored(store, capture)
    for window in (0, 100, -128):
        with pytest.raises(UsageError, match="multiple of 128"):
            put(store, whole, LOSSLESS, window=window)
    with pytest.raises(UsageError, match="fisher-5 codes tokens by what follows"):
        put(store, whole, CODECS["fisher-5"])
    with pytest.raises(UsageError, match="profile"):
        put(store, whole, prefix_stable(CODECS["fisher-5"]))
    assert not list((store.path / "objects").iterdir())
    assert not list((store.path / "kinds").iterdir())


@pytest.mark.parametrize("name", ["kivi-3", "turboquant-3", "cachegen-4", "local-4", "zstd"])
def test_every_family_without_a_profile_can_be_stored(store: Store, name: str) -> None:
    """The rows of a prefix are those that the whole text gives."""
    codec, tokens = prefix_stable(codec_named(name)), made_up([(0, 300)])
    put(store, text(tokens), codec, window=128)
    whole = fetch(store, Prompt.of_tokens(tokens), codec=codec)[1]
    done, part = fetch(store, Prompt.of_tokens(tokens[:140]), codec=codec)
    assert (done.held, done.lossless) == (140, name == "zstd")
    assert ("lossy" in part.metadata) == (name != "zstd")
    for key in ("layers.0.keys", "layers.1.values"):
        assert np.array_equal(whole.read(key)[:, :140], part.read(key))


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_has_a_variant_for_stores(name: str) -> None:
    codec = CODECS[name]
    stable = prefix_stable(codec)
    assert stable.traits.prefix_stable
    assert prefix_stable(stable) is stable
    assert (stable is codec) == codec.traits.prefix_stable
    assert stable.name in (name, f"{name}-prefix", name.replace("kvtc-", "kvtc-all-"))
    assert stable.traits.needs == codec.traits.needs


def test_gc_removes_the_least_recently_used_leaves_first(store: Store) -> None:
    prompt = list(range(9000, 9128))
    chats = [prompt + [1000 * i + at for at in range(200)] for i in range(3)]
    for i, tokens in enumerate(chats):
        stored(store, text(tokens))
        _age(store, 100 - i)
    fetch(store, Prompt.of_tokens(chats[0]))
    size = report(store).bytes
    (store.path / "tmp" / "left").write_bytes(b"x")
    assert collect(store).leftovers == 1
    done = collect(store, max_bytes=size - 1)
    assert (done.removed, done.kept) == (1, 6)
    assert [fetch(store, Prompt.of_tokens(tokens))[0].held for tokens in chats] == [328, 256, 328]
    _age(store, 1000)
    fetch(store, Prompt.of_tokens(chats[2]))
    collect(store, max_age=500)
    assert [fetch(store, Prompt.of_tokens(tokens))[0].held for tokens in chats] == [128, 128, 328]
    done = collect(store, max_bytes=0)
    assert (done.kept, done.kept_bytes) == (0, 0)
    assert not list((store.path / "objects").iterdir())
    assert not list((store.path / "kinds").iterdir())
    assert not verify(store.path).damage


def _age(store: Store, seconds: float) -> None:
    """Make every object look as if it were last used so much earlier."""
    import os

    for path in (store.path / "objects").rglob("*.kvp"):
        os.utime(path, (path.stat().st_mtime - seconds,) * 2)


@given(texts=st.lists(SEGMENTS, min_size=1, max_size=4), share=st.floats(0, 1))
def test_gc_never_breaks_a_chain(tmp_path_factory: pytest.TempPathFactory, texts: list[Any], share: float) -> None:
    store = Store.create(tmp_path_factory.mktemp("store") / "s")
    for segments in texts:
        stored(store, text(made_up(segments)))
    limit = int(report(store).bytes * share)
    done = collect(store, max_bytes=limit)
    found = report(store)
    assert found.bytes == done.kept_bytes <= limit
    assert found.unreadable == 0
    assert not verify(store.path).damage


def test_gc_waits_for_those_who_read_and_put(store: Store) -> None:
    stored(store, text(made_up([(0, 200)])))
    removed: list[int] = []
    thread = threading.Thread(target=lambda: removed.append(collect(store, max_bytes=0).removed))
    with store.locked():
        thread.start()
        time.sleep(0.2)
        assert not removed
        assert fetch(store, Prompt.of_tokens(made_up([(0, 200)])))[0].held == 200
    thread.join()
    assert removed == [2]


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds letter\.txt"):
        Store.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_store_that_was_half_made_is_finished(tmp_path: Path) -> None:
    whole = Store.create(tmp_path / "a")
    key = (whole.path / "key").read_bytes()
    for entries in ([], ["kinds"], ["kinds", "objects", "tmp"], ["kinds", "objects", "tmp", "lock", "key"]):
        path = tmp_path / str(len(entries))
        path.mkdir()
        for name in entries:
            (path / name).write_bytes(key) if name == "key" else (path / name).mkdir() if name != "lock" else None
        stored(Store.create(path), text([1, 2, 3]))
        assert not verify(path).damage
    assert whole.path.joinpath("key").stat().st_mode & 0o777 == 0o600


def test_an_object_is_a_plain_kvp_file_that_says_where_it_belongs(store: Store) -> None:
    stored(store, text(made_up([(0, 200)])))
    first, second = sorted((store.path / "objects").rglob("*.kvp"), key=lambda path: KvpFile.open(path).origin or 0)
    notes = json.loads(KvpFile.open(second).metadata["store"])
    assert notes == {
        "kind": first.parent.name,
        "parent": first.stem,
        "made": {"prefill": [72], "decode": 0, "continues": True},
    }
    assert second.parent.name == first.stem
