"""What is fuzzed: one function from bytes for each reader of what others wrote, with sound inputs to begin with.

A function returns for sound bytes, and raises one of kvpack's errors for others, with the exit code of a malformed file
(4), of a profile or model that does not fit (5), of what needs a newer kvpack (6), or of what takes more memory than it
may. Everything else is a finding.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from forge import assembled
from made_model import MadeModel
from mutators import Mutator, join, mutate_bytes, mutate_json, of_pieces, split
from samples import (
    NAMES,
    capture,
    capture_bytes,
    sample,
    samples,
    sound_profile,
)

from kvpack import jobs
from kvpack.bench.claims import parse_config
from kvpack.bench.links import with_links
from kvpack.bench.results import Results, compare, summarize
from kvpack.cache.metadata import parse_metadata, parse_values
from kvpack.cache.untrusted import parse_json, printable
from kvpack.codecs.chain.entropy.scaled_rans import cpu as scaled_rans
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.protocol import Need
from kvpack.codecs.recipes import CODECS, prefix_stable
from kvpack.engine import CpuEngine, DecodeTask
from kvpack.engine.cpu import decode_block
from kvpack.errors import KvpackError
from kvpack.fidelity import check
from kvpack.fidelity import compare as compare_caches
from kvpack.formats.input import source_of
from kvpack.formats.records import attention_mass, probe_positions, probe_queries, token_ids
from kvpack.formats.safetensors import TensorFile
from kvpack.formats.source import Capture
from kvpack.jobs.integrity import examine, salvage
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container
from kvpack.kvp.features import KNOWN_CRITICAL
from kvpack.kvp.frame import FramePart, Stream
from kvpack.kvp.inspection import inspect_capture, inspect_container
from kvpack.kvp.layout import FOOTER, PROLOGUE, Record, pack_index
from kvpack.kvp.recovery import recover
from kvpack.numerics.checksum import checksum
from kvpack.profiles import Profile
from kvpack.store.keys import kind_name, object_name
from kvpack.store.objects import cut, kind_of, notes_of, proven
from kvpack.store.schedule import Piece

MOST_HELD, MOST_DIMS = 1 << 20, 256
"""Files that hold more bytes, or longer vectors, are opened but not decoded: that takes time, as it must."""

ACCEPTED = {4, 5, 6}


@dataclass(frozen=True)
class Target:
    """A reader: what it does with bytes, sound bytes, and how they are changed."""

    read: Callable[[bytes], None]
    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutator

    def attempt(self, data: bytes) -> bool:
        """Give the reader ``data``. Return whether it took them; raise what is not an error that it may raise."""
        try:
            self.read(data)
        except KvpackError as error:
            if error.exit_code not in ACCEPTED and "--memlimit" not in str(error):
                raise
            return False
        return True


def mended(header: bytes, body: bytes, index: bytes) -> bytes:
    """A file of an inflated header, streams and an inflated index, whose prologue allows every feature."""
    deflated = zlib.compress(header, 1), zlib.compress(index, 1)
    return assembled(deflated[0], body, deflated[1], deflated=True, critical=KNOWN_CRITICAL)


# ---- Opening a file --------------------------------------------------------------------------------------------------


def open_bytes(data: bytes) -> None:
    """Open bytes as a ``.kvp`` file and inspect it."""
    container = Container(memoryview(data))
    inspect_container("x", container)
    KvpFile(container, sound_profile())


def open_pieces(data: bytes) -> None:
    """Open a file of a header, an index and so many bytes of streams, all checksums right."""
    header, index, length = (*split(data), b"", b"", b"")[:3]
    body = bytes(int.from_bytes(length[:2], "little"))
    open_bytes(mended(header, body, index))


def taken_apart(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Return a sound file's header and index, both inflated, and its streams."""
    container = Container(memoryview(data))
    end = len(data) - container.index_size
    header = zlib.decompress(data[PROLOGUE.size : container.header_size])
    return header, zlib.decompress(data[end : -FOOTER.size]), data[container.header_size : end]


@cache
def files() -> tuple[bytes, ...]:
    """Return sound files: one of every codec, an object of a store, and one of a verbatim source header."""
    compact = sample("replay-fast").data
    header, index, body = taken_apart(compact)
    document = {**json.loads(header), "source": Container(memoryview(compact)).header.source}
    verbatim = mended(json.dumps(document).encode(), body, index)
    return (*(one.data for one in samples()), object_bytes(), verbatim)


def opening_seeds() -> list[bytes]:
    """Return the headers and indices of the sound files."""
    pieces = map(taken_apart, files())
    return [join([header, index, len(body).to_bytes(2, "little")]) for header, index, body in pieces]


# ---- Decoding --------------------------------------------------------------------------------------------------------


def remember_slots() -> None:
    """Make the slots of frequency tables once for each content. They are most of the time of decoding so little."""
    make, known = scaled_rans.slots, {}

    def slots(tables: np.ndarray) -> np.ndarray:
        key = tables.tobytes()
        if key not in known:
            if len(known) > 3:
                known.clear()
            known[key] = make(tables)
        return known[key]

    scaled_rans.slots = slots


remember_slots()


@cache
def tasks_of(name: str) -> tuple[DecodeTask, ...]:
    """Return the blocks of a codec's file that have streams. Token ids are decoded, not taken from the context."""
    file = sample(name).open()
    tasks = [task for task in file.tasks() if any(part.streams for part in task.parts)]
    for task in tasks:
        if not task.block.layered:
            task.context = DecodeContext(model=file.model)
    mine = [task for task in tasks if task.codec == file.codecs[0]]
    return tuple(mine)


def decode_streams(name: str, data: bytes) -> None:
    """Decode a block whose streams are pieces, after a piece that says which block; checksums are right."""
    number, *pieces = split(data) or [b""]
    tasks = tasks_of(name)
    task = tasks[int.from_bytes(number[:1], "little") % len(tasks)]
    left = iter(pieces)
    parts = []
    for part in task.parts:
        streams = [
            old if new == old.data else Stream(old.name, memoryview(new), checksum(new))
            for old, new in zip(part.streams, left, strict=False)
        ]
        parts.append(FramePart(part.codec, part.digest, tuple(streams)))
    check_block(DecodeTask(task.ticket, task.block, lambda: tuple(parts), task.codec, task.context))


def check_block(task: DecodeTask) -> None:
    """Decode a block, and check that all of it is there."""
    done = decode_block(task)
    for spec, bits in zip(task.block.parts, done.arrays, strict=True):
        assert bits.shape == spec.shape, (bits.shape, spec.shape)
        assert bits.dtype == np.dtype(f"<u{spec.tensor.itemsize}"), bits.dtype


def decode_seeds(name: str) -> list[bytes]:
    """Return the streams of each block of a codec's file."""
    return [
        join([bytes([number]), *(bytes(stream.data) for part in task.parts for stream in part.streams)])
        for number, task in enumerate(tasks_of(name))
    ]


# ---- Whole files with any codec --------------------------------------------------------------------------------------


def build(data: bytes) -> bytes:
    """Put a file together from a header, a table of parts (codec and kinds of streams) and streams."""
    header, table, *streams = (*split(data), b"", b"")[: max(len(split(data)), 2)]
    left, parts, at = iter(streams), [], 0
    while at + 10 <= len(table):
        codec, count, digest = table[at], min(table[at + 1], 64), int.from_bytes(table[at + 2 : at + 10], "little")
        kinds = table[at + 10 : at + 10 + count]
        parts.append((codec, digest, [(kind, stream) for kind, stream in zip(kinds, left, strict=False)]))
        at += 10 + count
    records = [(c, d, [Record(k, len(s), checksum(s)) for k, s in own]) for c, d, own in parts]
    body = b"".join(stream for _, _, own in parts for _, stream in own)
    return assembled(zlib.compress(header, 1), body, pack_index(records), deflated=True, critical=KNOWN_CRITICAL)


def whole(data: bytes) -> bytes:
    """Return the pieces that :func:`build` makes a sound file of."""
    container = Container(memoryview(data))
    table, streams = b"", []
    for entry in container.parts:
        kinds = bytes(record.kind for record, _ in entry.streams)
        table += bytes([entry.codec, len(kinds)]) + entry.digest.to_bytes(8, "little") + kinds
        streams += [data[at : at + record.size] for record, at in entry.streams]
    return join([taken_apart(data)[0], table, *streams])


def decode_file(data: bytes) -> None:
    """Open a file and decode all of it, if it does not hold too much."""
    container = Container(memoryview(build(data)))
    document = container.header.profile
    if document is not None:
        document["sha256"] = sound_profile().sha256  # a change of the digest alone would be all that is found
    file = KvpFile(container, sound_profile(), model=MadeModel())
    dims = max((tensor.shape[2] for tensor in file.spec.layers), default=0)
    if container.source.file_size <= MOST_HELD and dims <= MOST_DIMS:
        for task in file.tasks():
            check_block(task)


def file_seeds() -> list[bytes]:
    """Return every sound file in pieces."""
    return [whole(data) for data in files()]


def salvage_bytes(data: bytes) -> None:
    """Open a damaged file, its ends made anew where they are damaged, examine it, and salvage what is intact."""
    view = memoryview(data)
    ends, _ = recover(source_of(view))
    file = KvpFile(Container(view, ends), sound_profile(), model=MadeModel(), approximate=True)
    dims = max((tensor.shape[2] for tensor in file.spec.layers), default=0)
    if file.container.source.file_size <= MOST_HELD and dims <= MOST_DIMS:
        engine = CpuEngine(1)
        examine(file, engine=engine)
        salvage(file, io.BytesIO(), engine=engine)


def salvage_seeds() -> list[bytes]:
    """Return the sound files, and those with a damaged end: what a mutation changes then is the rest."""
    ends = [b"?" + data[1:-1] + b"?" for data in files()[::4]]
    return [*files(), *ends]


# ---- Profiles --------------------------------------------------------------------------------------------------------

PROFILED = tuple(name for name in NAMES if name in CODECS and Need.PROFILE in CODECS[name].traits.needs)
MOST_ARRAY = 1 << 18


def decode_with_profile(data: bytes) -> None:
    """Decode a block of one codec's sound file with a profile of these arrays: dtypes and shapes, then their bytes."""
    number, header, *arrays = (*split(data), b"", b"")[: max(len(split(data)), 2)]
    profile = profile_of(header, arrays)
    name = PROFILED[int.from_bytes(number[:1], "little") % len(PROFILED)]
    for task in sample(name).open(profile=profile).tasks():
        if task.block.layered:
            check_block(task)


def profile_of(header: bytes, arrays: Sequence[bytes]) -> Profile:
    """Put a profile together. Where the JSON is one of dtypes and shapes, arrays get offsets and a size that fit."""
    document = parse_json(header, "profile")
    left, at, body = iter(arrays), 0, []
    if isinstance(document, dict):
        for entry in document.values():
            if isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and "data_offsets" in entry:
                size = _bytes_of(entry)
                entry["data_offsets"] = [at, at + size]
                at += size
                body.append(next(left, b"")[:size].ljust(min(size, MOST_ARRAY), b"\0"))
    raw = json.dumps(document).encode()
    view = memoryview(len(raw).to_bytes(8, "little") + raw + b"".join(body))
    return Profile(TensorFile.of("fuzzed.kvprofile", view), Path("fuzzed.kvprofile"), sound_profile().sha256)


def _bytes_of(entry: dict[str, Any]) -> int:
    item = {"F16": 2, "F32": 4, "I32": 4, "U8": 1}.get(entry["dtype"], 1)
    shape = entry.get("shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return item
    size = item
    for length in shape:
        size *= length
    return size


@cache
def profile_seeds() -> list[bytes]:
    """Return, for each calibrated codec, the arrays that its section has."""
    file, seeds = sound_profile()._file, []  # the header as it was written
    for number, name in enumerate(PROFILED):
        start = name.split("-", maxsplit=1)[0]
        starts = {"fisher": ("fisher", "rope"), "kvtc": ("kvtc", "rope"), "aquakv": (name, "rope", "higgs")}[start]
        chosen = [spec for spec in file.header.tensors if spec.name.startswith(starts)]
        entries: dict[str, Any] = {"__metadata__": dict(file.metadata)}
        for spec in chosen:
            entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.declared_shape), "data_offsets": [0, 0]}
        header = json.dumps(entries).encode()
        seeds.append(join([bytes([number]), header, *(bytes(file.data(spec)) for spec in chosen)]))
    return seeds


def mutate_number_of_32_bits(data: bytes, rng: Any) -> bytes:
    """Change elements of an array, most often to an extreme number."""
    if rng.random() < 0.4 or len(data) < 4:
        return mutate_bytes(data, rng)
    found = np.frombuffer(data[: len(data) // 4 * 4], "<u4").copy()
    values = (0, 1, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x7FFFFFFF, 0xFFFFFFFF, 64)
    for _ in range(rng.choice((1, 1, 2, 8))):
        found[rng.randrange(len(found))] = rng.choice((*values, rng.getrandbits(32), rng.randrange(1 << 15)))
    return found.tobytes() + data[len(found) * 4 :]


# ---- Captures --------------------------------------------------------------------------------------------------------


def read_capture(data: bytes) -> None:
    """Open bytes as a capture, parse its metadata, and read all that a capture may record."""
    file = TensorFile.of("x", memoryview(data))
    inspect_capture("x", file.header)
    found = Capture(file)
    metadata = parse_metadata(found.metadata)
    metadata.schedule_of(5), metadata.attention_scale(0), metadata.rotary_dimensions
    token_ids(found), attention_mass(found), probe_positions(found)
    for layer in (0, 1):
        probe_queries(found, layer)
    for name in found.tensors:
        found.read(name)


def of_header_and_data(data: bytes) -> bytes:
    """Return a safetensors file of two pieces, header and data, whose length is right."""
    header, body = (*split(data), b"", b"")[:2]
    return len(header).to_bytes(8, "little") + header + body


def read_pieces(data: bytes) -> None:
    """Read a capture of a header and data."""
    read_capture(of_header_and_data(data))


def there_and_back(data: bytes) -> None:
    """Compress a capture losslessly, or by a lossy codec that carries what it cannot represent, and decompress it."""
    number, *rest = split(data) or [b""]
    raw = of_header_and_data(join(rest))
    file = TensorFile.of("x", memoryview(raw))
    dims = max((spec.shape[-1] for spec in file.header.tensors if len(spec.shape) == 3), default=0)
    if dims > MOST_DIMS:
        return
    codec = CODECS[FREE[int.from_bytes(number[:1], "little") % len(FREE)]]
    sink, back = io.BytesIO(), io.BytesIO()
    jobs.compress(Capture(file), sink, codec, engine=CpuEngine(1))
    jobs.decompress(KvpFile(Container(memoryview(sink.getvalue()))), back, engine=CpuEngine(1))
    assert len(back.getvalue()) == len(raw)
    assert not codec.lossless or back.getvalue() == raw


def verify_pieces(data: bytes) -> None:
    """Measure a capture of a header and data against the same with other data, as ``verify`` does."""
    raw = of_header_and_data(data)
    other = bytearray(raw)
    start = 8 + int.from_bytes(raw[:8], "little")
    other[start::7] = bytes(len(other[start::7]))
    found = TensorFile.of("x", memoryview(raw))
    if max((spec.shape[-1] for spec in found.header.tensors if len(spec.shape) == 3), default=0) <= MOST_DIMS:
        report = compare_caches(Capture(found), Capture(TensorFile.of("y", memoryview(bytes(other)))))
        json.dumps(report.to_json(), allow_nan=False)
        check(report, 0.1, 0.1, bit_exact=True)


FREE = ("lossless", "zstd", "kivi-3", "turboquant-prod-2", "cachegen-4", "local-4")
"""Codecs that compress any capture: without a profile and without a model."""


def capture_seeds() -> list[bytes]:
    """Return the header and the data of two captures."""
    every = [capture_bytes(capture(12, probes=probes)) for probes in (False, True)]
    return [join([raw[8 : 8 + (n := int.from_bytes(raw[:8], "little"))], raw[8 + n :]]) for raw in every]


def there_and_back_seeds() -> list[bytes]:
    """Return each capture for each codec."""
    return [join([bytes([number]), *split(seed)]) for seed in capture_seeds() for number in range(len(FREE))]


# ---- Stores ----------------------------------------------------------------------------------------------------------

KEY = b"k" * 32


@cache
def object_bytes() -> bytes:
    """Return an object of a store: the first of its kind."""
    found, codec = capture(12), prefix_stable(CODECS["lossless"])
    notes = notes_of("0" * 64, "0" * 64, Piece((10,), 2, False))
    job = jobs.prepare(cut(found, 0, 12, notes), codec, origin=0)
    sink = io.BytesIO()
    next(jobs.compress_many([job], CpuEngine(1)))(sink, None)
    return sink.getvalue()


def prove_object(data: bytes) -> None:
    """Open an object where its own tokens and its notes say that it lies."""
    file = KvpFile(Container(memoryview(build(data))))
    notes = parse_values(file.metadata).get("store")
    tokens = (
        token_ids(file) if file.tensors.get("tokens", None) and file.container.source.file_size < MOST_HELD else None
    )
    if not isinstance(notes, dict) or tokens is None or not isinstance(notes.get("parent"), str):
        name, parent = "0" * 64, "0" * 64
    else:
        made = Piece.from_json(notes.get("made"), len(tokens))
        kind = kind_name(KEY, kind_of(file))
        parent = kind if file.origin == 0 else "1" * 64
        text = json.dumps({**notes, "kind": kind, "parent": parent})
        file.metadata = {**file.metadata, "store": text}
        name = object_name(KEY, parent, made.made if made else "unknown", tokens)
    proven(KEY, Path("objects") / parent / f"{name}.kvp", file)


# ---- Documents -------------------------------------------------------------------------------------------------------


def read_text(data: bytes) -> None:
    """Parse bytes as the header of a file, and as documents of its metadata."""
    text = data.decode(errors="surrogateescape")
    printable(text)
    keys = ("model", "rope", "attention", "schedule", "needles", "dtype", "store")
    parse_values(dict.fromkeys(keys, text))
    found = parse_metadata(dict.fromkeys(keys, text))
    _ = found.model_name, found.weights_sha256, found.rotary_dimensions, found.attention_scale(1)
    parse_json(data, "header")


def text_seeds() -> list[bytes]:
    """Return headers and documents of metadata."""
    source = Container(memoryview(sample("lossless").data)).source
    return [source.raw, *(value.encode() for value in source.metadata.values())]


def read_config(data: bytes) -> None:
    """Read bytes as the configuration of a model."""
    parse_config(data, "x")


def config_seeds() -> list[bytes]:
    """Return the configurations among the fixtures."""
    fixtures = Path(__file__).parent.parent.parent / "fixtures"
    found = [path.read_bytes() for path in sorted(fixtures.glob("*-config.json"))]
    return [*found, b'{"text_config":' + found[0] + b"}"]


def read_results(data: bytes) -> None:
    """Read bytes as the results of ``kvpack bench``, summarize them, and compare them with themselves."""
    found = Results.parse(data, "x")
    with_links(found.rows, summarize(found.rows))
    compare(found, found)


@cache
def results_seeds() -> list[bytes]:
    """Return results of two codecs and of a bound."""
    model = {
        "plain": {"kl_mean": 0.1, "ppl_change": 0.2, "top1": 0.9}, "repeat": None, "greedy_identical": 3,
        "needles_found": 1, "needles_found_original": 1,
    }  # fmt: skip
    row = dict.fromkeys(_row_fields(), 0.5) | {
        "document": "a.txt", "document_sha256": "0" * 64, "codec": "fisher-4", "seed": 0, "size": 100, "model": model,
        "decode_flops": 5,
    }  # fmt: skip
    bound = {**row, "codec": "bound", "size": None, "ratio": None}
    rows = [row, {**row, "document_sha256": "1" * 64}, {**row, "codec": "lossless", "model": None}, bound]
    return [json.dumps({"schema_version": 3, "setting": {"model": "x"}, "machine": {}, "rows": rows}).encode()]


def _row_fields() -> list[str]:
    from dataclasses import fields

    from kvpack.bench.results import Row

    return [one.name for one in fields(Row)]


JSON_FIRST = of_pieces([mutate_json])

TARGETS: dict[str, Target] = {
    "opening": Target(open_pieces, opening_seeds, JSON_FIRST),
    "container": Target(open_bytes, files, mutate_bytes),
    "file": Target(decode_file, file_seeds, JSON_FIRST),
    "profile": Target(
        decode_with_profile, profile_seeds, of_pieces([mutate_bytes, mutate_json], mutate_number_of_32_bits)
    ),
    "salvage": Target(salvage_bytes, salvage_seeds, mutate_bytes),
    "capture": Target(read_pieces, capture_seeds, JSON_FIRST),
    "compress": Target(there_and_back, there_and_back_seeds, of_pieces([mutate_bytes, mutate_json])),
    "verify": Target(verify_pieces, capture_seeds, JSON_FIRST),
    "object": Target(prove_object, lambda: [whole(object_bytes())], JSON_FIRST),
    "text": Target(read_text, text_seeds, mutate_json),
    "config": Target(read_config, config_seeds, mutate_json),
    "results": Target(read_results, results_seeds, mutate_json),
    **{
        f"decode/{name}": Target(partial(decode_streams, name), partial(decode_seeds, name), of_pieces([mutate_bytes]))
        for name in NAMES
    },
}
"""Every target by name."""
