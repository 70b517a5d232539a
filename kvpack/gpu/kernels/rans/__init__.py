"""rANS on a GPU: the same streams as ``cpu.py``, many parts of one shape a launch, nothing waited for.

Encoding: one pass counts codes (``scan.cu``; for bf16 it packs mantissas and sums the digest on the way), a block a
part makes the bank of tables (``bank.cu``), a warp encodes a group (``encode.cu``), then streams are placed one behind
another and filled (``emit.cu``). Decoding: ``prepare.cu`` reads heads and tables, ``decode.cu`` runs the groups. What
is stored without a model is ``pack.cu``'s, both ways.

A context-modelled coder can build on the same pieces: the loop around ``put`` and ``get``, the words of a group, and
``layout`` and ``emit`` do not know where a symbol's table comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from kvpack.codecs.chain.entropy.rans import LANE_BYTES, MAX_SYMBOLS, MAX_WIDTH, tables
from kvpack.gpu.kernels.constants import COMMON, RANS
from kvpack.gpu.runtime.launch import Launcher

Tensor = torch.Tensor

META, MODE, TABLES, ALPHABET, SLOT_BYTES, FAULT = (
    RANS[name] for name in ("META", "MODE", "TABLES", "ALPHABET", "SLOT_BYTES", "FAULT")
)
"""Number of int32 values that are known of each part's stream (``meta`` ``[P, META]``), and positions of some."""
MAX_ENTRIES, MAX_SLOTS = RANS["MAX_ENTRIES"], RANS["MAX_TABLES"] * RANS["MAX_SLOTS"]
"""Entries of all encoding tables of a part, and slots of all its decoding tables, at most."""
SMALL_BANK, LARGE_BANK = 2048, tables.BANK_TABLES * MAX_SYMBOLS
"""Entries (tables times symbols) of a bank that the first and the second launch of ``bank.cu`` have room for."""
BANK_BYTES = 7
WIDE = 512
"""Channels of a part beyond which a block of ``bank.cu`` has twice the threads."""
MAX_TOKENS = 32768
"""Counts of a channel are 16 bits, codes of a part below 2**31."""
MAX_PAYLOAD = (1 << 31) - 1
ENCODE_SHARED, ENCODE_ENTRIES = 32 << 10, 56
"""Most shared memory in bytes for a block's encoding tables, and symbols a table as a rule."""
THREADS = 1152
"""Threads that find registers to decode on a multiprocessor at once."""
PACK_BLOCKS = 16
"""Blocks that pack or unpack a part."""
RING_BYTES = COMMON["RING"]
"""Bytes of shared memory in which a decoding warp holds the words that come next."""
SLOTS_A_TABLE = 464
"""Slots of a decoding table as a rule: 256 runs at most, and the rare symbols' (measured on SmolLM2-135M)."""


@dataclass(frozen=True)
class Parts:
    """Parts ``[H, T, D]`` of one shape in device memory.

    ``addresses`` int64 ``[P]``; rows are contiguous, heads ``head_stride`` elements of ``item`` bytes apart. A code is
    the ``width`` bits above ``shift``; with ``floats`` (bf16) the bits below are the mantissa.
    """

    addresses: Tensor
    shape: tuple[int, int, int]
    head_stride: int
    item: int = 1
    shift: int = 0
    width: int = 8
    floats: bool = False

    @property
    def count(self) -> int:
        """Number of parts."""
        return len(self.addresses)

    @property
    def channels(self) -> int:
        """Channels a part."""
        return self.shape[0] * self.shape[2]

    @property
    def size(self) -> int:
        """Codes a part."""
        return self.channels * self.shape[1]

    @property
    def groups(self) -> int:
        """Groups a part at most."""
        return -(-self.channels // 32)

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Head stride, heads and tokens, as kernels take them."""
        return (self.head_stride, *self.shape[:2])

    @property
    def defines(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {"ITEM": self.item, "SHIFT": self.shift, "BINS": 1 << self.width}

    @property
    def walk(self) -> dict[str, int]:
        """What kernels that walk over parts are compiled for."""
        return {**self.defines, "DIMS": self.shape[2], "FLOATS": int(self.floats)}


def supports(shape: tuple[int, int, int], width: int, floats: bool) -> bool:
    """Whether the kernels take parts of this shape: D a multiple of 64 with ``floats``, no more than 32,768 tokens."""
    heads, tokens, dims = shape
    multiple = 64 if floats else 1
    return 0 < tokens <= MAX_TOKENS and dims > 0 and heads > 0 and dims % multiple == 0 and width <= MAX_WIDTH


@dataclass(frozen=True)
class Streams:
    """Streams in device memory, with their mode byte: part p's is ``arena[places[p]:][:sizes[p]]``.

    The last of ``places`` ``[P + 1]`` is where they end. Checksums are as in ``docs/format.md``.
    """

    arena: Tensor
    places: Tensor
    sizes: Tensor
    checksums: Tensor


@dataclass(frozen=True)
class Coded(Streams):
    """By rANS where that is smaller than packing; with floats also the mantissas' streams, and digests.

    Those of mantissas are ``mantissas[p, 15 : 16 + ...]``, with their mode byte.
    """

    meta: Tensor
    mantissas: Tensor | None
    mantissa_checksums: Tensor | None
    digests: Tensor | None


@lru_cache(maxsize=8)
def _rules(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """``tables.py``'s nearest level, levels, and cost of frequencies, on the device."""
    return (
        torch.from_numpy(tables._NEAREST.astype(np.uint8)).to(device),
        torch.from_numpy(tables.LEVELS.astype(np.int16)).to(device),
        torch.from_numpy(tables._COST.astype(np.int32)).to(device),
    )


def mantissa_size(parts: Parts) -> int:
    """Bytes of a part's packed mantissas."""
    return (parts.size * parts.shift + 7) // 8


def checksums(gpu: Launcher, starts: Tensor, sizes: Tensor) -> Tensor:
    """Checksums ``[S]`` (int64, the bits of the unsigned value) of byte ranges in device memory."""
    sums = torch.zeros(len(starts), dtype=torch.int64, device=gpu.device)
    gpu.launch("common/checksum:checksum", {}, (8, len(starts)), 256, 0, starts, sizes, sums)
    return sums


def encode(gpu: Launcher, parts: Parts) -> Coded:
    """Streams of ``parts``; waits for nothing."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=gpu.device)

    count, channels, groups, defines, walk = parts.count, parts.channels, parts.groups, parts.defines, parts.walk
    bins, blocks, rules = 1 << parts.width, -(-parts.channels // 64), _rules(gpu.device)
    masks = -(-bins // 32)
    scan_shared = 128 * bins + 4 * masks
    if scan_shared > gpu.max_shared:
        raise ValueError(f"codes of {parts.width} bits take {scan_shared} bytes of shared memory to be counted")
    rows, present = empty(torch.int32, count, blocks, bins, 32), empty(torch.int32, count, blocks, masks)
    packed_size = mantissa_size(parts)
    stride = (packed_size + 31) // 16 * 16 + 16 if parts.floats else 0
    mantissas = empty(torch.uint8, count, stride)
    sums = empty(torch.int64, count, 2)
    sums[:, 0], sums[:, 1] = parts.size * parts.item, 1 + packed_size
    if parts.floats:
        mantissas[:, 15] = 0
    packed = mantissas.data_ptr() + 16 if parts.floats else 0
    gpu.launch("rans/scan:scan", walk, (blocks, count), RANS["SCAN_THREADS"], scan_shared, parts.addresses,
               *parts.geometry, rows, present, packed, stride, sums)  # fmt: skip
    counts, symbols = empty(torch.int16, count, MAX_SYMBOLS, 64 * blocks), empty(torch.int16, count, MAX_SYMBOLS)
    maps, names = empty(torch.uint8, count, bins), empty(torch.uint8, count, channels)
    codes, entries = empty(torch.uint8, count, MAX_ENTRIES), empty(torch.int64, count, MAX_ENTRIES)
    keys, meta = empty(torch.int32, count, channels), empty(torch.int32, count, META)
    bank, threads = tables.bank_size(parts.size, channels), 256 if channels <= WIDE else 512
    for least, most in ((0, SMALL_BANK), (SMALL_BANK, LARGE_BANK)):
        if bank * min(bins, MAX_SYMBOLS) > least:
            gpu.launch("rans/bank:bank", {**defines, "THREADS": threads}, (count, 1), threads,
                       BANK_BYTES * most + 2 * bank, rows, present, blocks, channels, bank, *rules, counts, symbols,
                       maps, names, codes, entries, keys, meta, least, most, LANE_BYTES)  # fmt: skip
    scratch = empty(torch.int16, count, groups * 32 * parts.shape[1])
    lengths, states = empty(torch.int32, count, groups), empty(torch.int32, count, channels)
    warps, room = min(8, groups), min(ENCODE_SHARED, 8 * ENCODE_ENTRIES * bank)
    gpu.launch("rans/encode:encode", walk, (-(-groups // warps), count), 32 * warps, room,
               parts.addresses, *parts.geometry, meta, entries, maps, names, scratch, groups, lengths, states,
               room)  # fmt: skip
    places, sizes = empty(torch.int64, count + 1), empty(torch.int64, count)
    gpu.launch("rans/emit:layout", {}, (1, 1), 1024, 0, meta, lengths, count, groups, channels,
               parts.width, parts.size, places, sizes)  # fmt: skip
    arena = empty(torch.uint8, count * ((parts.size * parts.width + 7) // 8 + 32) + slack(parts))
    gpu.launch("rans/emit:emit", {}, (1 + groups, count), 256, 0, meta, lengths, groups,
               channels, parts.width, symbols, codes, names, states, scratch, parts.shape[1], places,
               arena)  # fmt: skip
    _pack(gpu, parts, meta, places, arena)
    own = checksums(gpu, places[:count] + arena.data_ptr(), sizes)
    if not parts.floats:
        return Coded(arena, places, sizes, own, meta, None, None, None)
    return Coded(arena, places, sizes, own, meta, mantissas, sums[:, 1], sums[:, 0])


def _pack(gpu: Launcher, parts: Parts, meta: Tensor | None, places: Tensor, arena: Tensor) -> None:
    gpu.launch("rans/pack:pack", {"ITEM": parts.item}, (PACK_BLOCKS, parts.count), 256, 0, parts.addresses,
               *parts.geometry, parts.shape[2], parts.width, parts.shift, meta, places, arena)  # fmt: skip


def pack(gpu: Launcher, parts: Parts) -> Streams:
    """Streams of codes without a model: packed, whatever they are; waits for nothing."""
    size = 1 + (parts.size * parts.width + 7) // 8
    stride = (size + 15) // 16 * 16
    arena = torch.empty(parts.count * stride + 16, dtype=torch.uint8, device=gpu.device)
    places = torch.arange(parts.count + 1, device=gpu.device) * stride
    sizes = torch.full((parts.count,), size, dtype=torch.int64, device=gpu.device)
    _pack(gpu, parts, None, places, arena)
    return Streams(arena, places, sizes, checksums(gpu, places[:-1] + arena.data_ptr(), sizes))


def unpack(gpu: Launcher, streams: Tensor, sizes: Tensor, parts: Parts, merge: bool) -> Tensor:
    """Streams of mode PACKED, as :func:`decode` takes them, into ``parts`` without gaps; faults ``[P]``, int32.

    With ``merge`` other bits of the elements are left as they are, else set to zero.
    """
    faults = torch.zeros(parts.count, dtype=torch.int32, device=gpu.device)
    gpu.launch("rans/pack:unpack", {"ITEM": parts.item}, (PACK_BLOCKS, parts.count), 256, 0, streams, sizes,
               parts.addresses, parts.size, parts.width, parts.shift, int(merge), faults)  # fmt: skip
    return faults


def slack(parts: Parts) -> int:
    """Bytes that must be readable behind streams that are decoded: what an unsound one could ask for."""
    return 2 * parts.size + 4096


def decode(gpu: Launcher, streams: Tensor, sizes: Tensor, parts: Parts, mantissas: Tensor | None = None,
           shared: int = 48 << 10,
           ranges: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Decode rANS streams into ``parts``; returns meta ``[P, 16]``, digests ``[P]`` (of floats), sums of ``ranges``.

    ``streams`` and ``mantissas`` (of floats: packed codes, without the mode byte) are int64 addresses ``[P]`` divisible
    by 4, ``sizes`` int64 bytes ``[P]``. Memory must be readable for :func:`slack` beyond any stream. ``shared`` is
    shared memory a block for its tables; parts that need more are slower. ``meta[:, FAULT]`` is not zero where a stream
    is unsound; streams of mode PACKED are left to the caller (``meta[:, MODE]``). ``ranges`` (addresses and sizes of
    streams) are summed beside the reading of tables, before a code is decoded.
    """

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=gpu.device)

    count, channels, groups = parts.count, parts.channels, parts.groups
    meta, bases = empty(torch.int32, count, META), empty(torch.int32, count, groups + 1)
    names, entries = empty(torch.uint8, count, channels), empty(torch.int64, count, MAX_ENTRIES)
    slots, tails = empty(torch.int32, count, MAX_SLOTS), empty(torch.int32, 2, count, tables.MAX_TABLES)
    sums = None
    if ranges is not None:
        sums = torch.zeros(len(ranges[0]), dtype=torch.int64, device=gpu.device)
        with gpu.side_stream():
            gpu.launch("common/checksum:checksum", {}, (8, len(sums)), 256, 0, *ranges, sums)
    gpu.launch("rans/prepare:prepare", {}, (count, 1), 256, 0, streams, sizes, channels, parts.shape[1],
               parts.width, groups, _rules(gpu.device)[1], meta, bases, names, entries, slots, tails)  # fmt: skip
    digests = torch.full((count,), parts.size * parts.item, dtype=torch.int64, device=gpu.device)
    warps = min(32, groups)
    gpu.join()
    shared = max(0, min(shared, gpu.max_shared - RING_BYTES * warps))
    block = {"BLOCK": 32 * warps, "BLOCKS": max(1, THREADS // (32 * warps))}
    gpu.launch("rans/decode:decode", {**parts.walk, **block}, (-(-groups // warps), count), 32 * warps,
               shared + RING_BYTES * warps, streams, meta, bases, names, slots, tails, groups, parts.addresses,
               *parts.geometry, mantissas, digests, shared)  # fmt: skip
    return meta, digests, sums


def shared_for(tables: int) -> int:
    """Shared memory in bytes that decoding streams with so many tables wants, at most 128 KiB."""
    return int(np.clip(-(-tables * SLOTS_A_TABLE * 4 // 1024) * 1024, 4096, 128 << 10))
