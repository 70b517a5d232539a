"""The ``rans`` entropy coder on a GPU: it makes the same streams as the CPU's, to the byte.

One launch takes many parts of one shape, and no function here waits for the GPU. In shapes, P is the number of parts,
H, T and D are a part's heads, tokens and dimensions, and C = H * D is the number of its channels.

To encode, ``scan.cu`` counts the codes in one pass; for bf16 it also packs the mantissas and sums the digest of the
original. In ``bank.cu`` a block of threads makes the frequency tables of one part. In ``encode.cu`` a warp encodes one
group of 32 lanes. At last ``emit.cu`` places the streams one behind another and fills them.

To decode, ``prepare.cu`` reads the heads and tables of the streams, and ``decode.cu`` decodes the groups. Planes that
are stored without a model are packed and unpacked by ``pack.cu``.
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
"""Bytes of shared memory for each of these entries: a sum (4), a frequency (2) and a frequency code (1)."""
WIDE = 512
"""A block of ``bank.cu`` has twice the threads if a part has more channels than this."""
MAX_TOKENS = 32768
"""Most tokens of a part: a code's count in a channel takes 16 bits, and all codes of a part are below 2**31."""
MAX_PAYLOAD = (1 << 31) - 1
"""Most bytes of a stream that is decoded: positions in it are 32-bit integers."""
ENCODE_SHARED, ENCODE_ENTRIES = 32 << 10, 56
"""Most bytes of shared memory for a block's encoding tables; and symbols that are reserved for each table there."""
THREADS = 1152
"""Decoding threads for which a multiprocessor has registers at once."""
PACK_BLOCKS = 16
"""Blocks of threads that pack or unpack one part."""
RING_BYTES = COMMON["RING"]
"""Bytes of shared memory in which a decoding warp holds the words that come next."""
SLOTS_A_TABLE = 464
"""Slots that a decoding table takes as a rule: at most 256 runs of 16, and those of rare symbols.

This was measured on SmolLM2-135M.
"""


@dataclass(frozen=True)
class Parts:
    """Parts ``[H, T, D]`` of one shape in device memory.

    Attributes:
        addresses: int64 ``[P]``, where each part begins.
        shape: heads, tokens and dimensions. The rows of a head are contiguous.
        head_stride: elements from the beginning of one head to that of the next.
        item: bytes of an element, 1 or 2.
        shift: bits of an element below its code.
        width: bits of a code.
        floats: whether elements are bf16 and the bits below the code are the mantissa.

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
        """Number of parts, P."""
        return len(self.addresses)

    @property
    def channels(self) -> int:
        """Number of channels of a part, C."""
        return self.shape[0] * self.shape[2]

    @property
    def size(self) -> int:
        """Number of codes of a part."""
        return self.channels * self.shape[1]

    @property
    def groups(self) -> int:
        """Most groups that a part can have."""
        return -(-self.channels // 32)

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Head stride, heads and tokens, in the order in which kernels take them."""
        return (self.head_stride, *self.shape[:2])

    @property
    def defines(self) -> dict[str, int]:
        """Macros that kernels are compiled with, which only look at single elements."""
        return {"ITEM": self.item, "SHIFT": self.shift, "BINS": 1 << self.width}

    @property
    def walk(self) -> dict[str, int]:
        """Macros that kernels are compiled with, which walk over the rows of parts."""
        return {**self.defines, "DIMS": self.shape[2], "FLOATS": int(self.floats)}


def supports(shape: tuple[int, int, int], width: int, floats: bool) -> bool:
    """Whether the kernels take parts of this shape, with codes of ``width`` bits.

    A part has at least one and at most 32,768 tokens. With ``floats``, D must be a multiple of 64. Codes of up to 12
    bits are packed; with a model codes of up to 9 bits are coded on every GPU that kvpack uses (see :func:`encode`).
    """
    heads, tokens, dims = shape
    multiple = 64 if floats else 1
    return 0 < tokens <= MAX_TOKENS and dims > 0 and heads > 0 and dims % multiple == 0 and width <= MAX_WIDTH


@dataclass(frozen=True)
class Streams:
    """Streams in device memory, each with its mode byte; part p's stream is ``arena[places[p]:][:sizes[p]]``.

    Attributes:
        arena: uint8, the memory in which all streams lie.
        places: int64 ``[P + 1]``, where each stream begins, and where the last one ends.
        sizes: int64 ``[P]``, bytes of each stream.
        checksums: int64 ``[P]``, the bits of the unsigned checksums of ``docs/format.md``.

    """

    arena: Tensor
    places: Tensor
    sizes: Tensor
    checksums: Tensor


@dataclass(frozen=True)
class Coded(Streams):
    """Streams that are coded by rANS where that is smaller than packing; of bf16 parts also the mantissas' streams.

    Attributes:
        meta: int32 ``[P, META]``, what is known of each stream.
        mantissas: uint8 ``[P, ...]``; the stream of part p, with its mode byte, begins at ``mantissas[p, 15]`` and has
            ``1 + mantissa_size(parts)`` bytes. None without floats.
        mantissa_checksums: int64 ``[P]``, checksums of these streams. None without floats.
        digests: int64 ``[P]``, checksums of the original parts. None without floats.

    """

    meta: Tensor
    mantissas: Tensor | None
    mantissa_checksums: Tensor | None
    digests: Tensor | None


@lru_cache(maxsize=8)
def _rules(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return three arrays of ``tables.py`` on the device: nearest levels, levels, and costs of frequencies."""
    return (
        torch.from_numpy(tables._NEAREST.astype(np.uint8)).to(device),
        torch.from_numpy(tables.LEVELS.astype(np.int16)).to(device),
        torch.from_numpy(tables._COST.astype(np.int32)).to(device),
    )


def mantissa_size(parts: Parts) -> int:
    """Return how many bytes a part's packed mantissas take, without the mode byte."""
    return (parts.size * parts.shift + 7) // 8


def checksums(gpu: Launcher, starts: Tensor, sizes: Tensor) -> Tensor:
    """Return the checksums of S byte ranges in device memory: int64 ``[S]``, the bits of the unsigned checksums.

    Args:
        gpu: where the memory is.
        starts: int64 ``[S]``, addresses. Up to 15 bytes around a range are read, but not used.
        sizes: int64 ``[S]``, bytes.

    """
    sums = torch.zeros(len(starts), dtype=torch.int64, device=gpu.device)
    gpu.launch("common/checksum:checksum", {}, (8, len(starts)), 256, 0, starts, sizes, sums)
    return sums


def encode(gpu: Launcher, parts: Parts) -> Coded:
    """Return the streams of ``parts``.

    Raises:
        ValueError: codes are so wide that counting them takes more shared memory than the GPU has; codes of up to 9
            bits never are.

    """

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
    warps, room = min(RANS["ENCODE_WARPS"], groups), min(ENCODE_SHARED, 8 * ENCODE_ENTRIES * bank)
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
    """Return the streams of codes that are stored without a model: all of them are packed."""
    size = 1 + (parts.size * parts.width + 7) // 8
    stride = (size + 15) // 16 * 16
    arena = torch.empty(parts.count * stride + 16, dtype=torch.uint8, device=gpu.device)
    places = torch.arange(parts.count + 1, device=gpu.device) * stride
    sizes = torch.full((parts.count,), size, dtype=torch.int64, device=gpu.device)
    _pack(gpu, parts, None, places, arena)
    return Streams(arena, places, sizes, checksums(gpu, places[:-1] + arena.data_ptr(), sizes))


def unpack(gpu: Launcher, streams: Tensor, sizes: Tensor, parts: Parts, merge: bool) -> Tensor:
    """Unpack streams of mode PACKED into ``parts``; return int32 ``[P]``, not 0 where a stream is unsound.

    Args:
        gpu: where the memory is.
        streams: int64 ``[P]``, addresses divisible by 4.
        sizes: int64 ``[P]``, bytes.
        parts: where the codes go; the heads of a part must lie one behind another.
        merge: whether the other bits of the elements keep their values; they become 0 otherwise.

    """
    faults = torch.zeros(parts.count, dtype=torch.int32, device=gpu.device)
    gpu.launch("rans/pack:unpack", {"ITEM": parts.item}, (PACK_BLOCKS, parts.count), 256, 0, streams, sizes,
               parts.addresses, parts.size, parts.width, parts.shift, int(merge), faults)  # fmt: skip
    return faults


def slack(parts: Parts) -> int:
    """Return how many bytes must be readable behind streams that are decoded: an unsound stream may ask for them."""
    return 2 * parts.size + 4096


def decode(gpu: Launcher, streams: Tensor, sizes: Tensor, parts: Parts, mantissas: Tensor | None = None,
           shared: int = 48 << 10,
           ranges: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Decode rANS streams into ``parts``.

    Args:
        gpu: where the memory is.
        streams: int64 ``[P]``, addresses divisible by 4; :func:`slack` bytes beyond each stream must be readable.
        sizes: int64 ``[P]``, bytes.
        parts: where the codes go.
        mantissas: int64 ``[P]``, addresses divisible by 4 of packed mantissas without their mode byte, for floats.
        shared: bytes of shared memory of a block for its tables, as :func:`shared_for` says. A GPU that has less uses
            what it has; parts whose tables need more are decoded more slowly.
        ranges: addresses and sizes, both int64 ``[S]``, of bytes whose checksums are computed during the reading of
            tables, before codes are decoded.

    Returns:
        Meta int32 ``[P, META]``: ``meta[:, FAULT]`` is not 0 where a stream is unsound, and where ``meta[:, MODE]`` is
        PACKED nothing was decoded. Digests int64 ``[P]`` of what was decoded, for floats. Checksums int64 ``[S]`` of
        ``ranges``, or None.

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
    """Return the bytes of shared memory with which streams of so many tables are decoded fastest, at most 128 KiB."""
    return int(np.clip(-(-tables * SLOTS_A_TABLE * 4 // 1024) * 1024, 4096, 128 << 10))
