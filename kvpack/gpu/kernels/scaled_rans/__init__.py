"""The ``scaled_rans`` entropy coder on a GPU: it makes the same streams as the CPU's, to the byte.

One launch takes many planes of one shape, and no function here waits for the GPU. In shapes, U is the number of planes,
T and D are a plane's tokens and columns, and K is the number of frequency tables.

A lane can only go on when its last step is done. Whatever can be done for all codes at once is therefore done by passes
of their own. To encode, ``measure.cu`` finds each code's class and symbol and sums what they will cost. In
``encode.cu`` a warp encodes one group of 32 lanes. At last ``emit.cu`` places the streams one behind another and fills
them. To decode (``decode.cu``), heads and lengths are checked, a pass finds the classes, a warp decodes the symbols of
one group, a pass makes codes of them, and a last pass adds the raw bits of the codes that have some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.codecs.chain.base import Scales
from kvpack.codecs.chain.entropy.scaled_rans import GROUP_BYTES, costs
from kvpack.codecs.chain.entropy.scaled_rans.reference import GROUP, PRECISION
from kvpack.codecs.chain.symbols import ALPHABET
from kvpack.gpu.kernels.constants import COMMON, SCALED_RANS
from kvpack.gpu.kernels.rans import checksums
from kvpack.gpu.runtime.launch import Launcher
from kvpack.gpu.runtime.tensors import sent

Tensor = torch.Tensor

META, FAULT = SCALED_RANS["META"], SCALED_RANS["FAULT"]
"""Number of int32 values that are known of each plane's stream (``meta`` ``[U, META]``), and the fault's position."""
SYMBOLS, RUN, WARPS, ROW_WARPS = (SCALED_RANS[name] for name in ("SYMBOLS", "RUN", "WARPS", "ROW_WARPS"))
GROUP_OVERHEAD = SCALED_RANS["GROUP_OVERHEAD"]
"""Bytes that a group takes in addition to its words: its length and its 32 states."""
RING_BYTES = COMMON["RING"]
"""Bytes of shared memory in which a decoding warp holds the words that come next."""
MAX_TABLES = 64
MAX_ROWS, MAX_CODES = 1 << 15, 1 << 29
"""Most tokens and most codes of a plane: a plane's raw bits are counted in 31 bits."""


def supports(tokens: int, dims: int, tables: int) -> bool:
    """Whether the kernels take planes ``[1, T, D]`` that are coded by so many tables."""
    return 0 < tokens <= MAX_ROWS and dims > 0 and tokens * dims <= MAX_CODES and tables <= MAX_TABLES


def _by_row(rows: int) -> tuple[tuple[int, int], int, int]:
    """Grid, threads of a block and shared memory of a kernel in which each warp takes one row."""
    return (-(-rows // ROW_WARPS), 1), 32 * ROW_WARPS, 0


@dataclass(frozen=True)
class Tables:
    """A profile's frequencies in device memory, as kernels take them.

    Attributes:
        costs: int16 ``[K, 64]``, what a symbol costs, in 64ths of a bit.
        entries: int64 ``[K, 64]``, what a symbol is encoded by (see ``encode.cu``).
        decoding: int32 ``[K, 64]``, what a symbol is decoded by: ``frequency << 14 | start``.
        coarse: int16 ``[K, 256]``, the symbols of the first and the last of every 64 slots: ``first | last << 8``.

    """

    costs: Tensor
    entries: Tensor
    decoding: Tensor
    coarse: Tensor

    @classmethod
    def of(cls, frequencies: NDArray[np.int32], device: str) -> Tables:
        """Return the tables of frequencies ``[K, 63]``, on the device."""
        f = frequencies.astype(np.int64)
        starts = np.cumsum(f, 1) - f
        reciprocals = np.minimum((1 << 32) // f, (1 << 32) - 1)
        slots = np.arange(1 << PRECISION)
        symbols = np.stack([np.searchsorted(row, slots, side="right") - 1 for row in starts])
        coarse = symbols[:, ::RUN] | symbols[:, RUN - 1 :: RUN] << 8

        def padded(values: NDArray[np.int64], dtype: Any) -> Tensor:
            wide = np.zeros((len(values), SYMBOLS), np.int64)
            wide[:, :ALPHABET] = values
            return sent(wide.astype(dtype), device)

        return cls(
            padded(costs(frequencies), np.int16),
            padded(reciprocals | f << 32 | starts << 46, np.int64),
            padded(f << PRECISION | starts, np.int32),
            sent(coarse.astype(np.int16), device),
        )

    @property
    def count(self) -> int:
        """Number of tables, K."""
        return len(self.costs)


@dataclass(frozen=True)
class Classes:
    """What says each code's class, in device memory.

    Attributes:
        columns: int32 ``[D]``, the columns of :class:`Scales`.
        rows: int32 ``[U, T]``, the rows of :class:`Scales` of each plane.
        tables: the tables that the classes count.

    """

    columns: Tensor
    rows: Tensor
    tables: Tables

    @classmethod
    def of(cls, scales: Sequence[Scales], tables: Tables, device: str) -> Classes:
        """Return the classes of planes that have one shape, the same columns and the same tables."""
        rows = np.stack([one.rows for one in scales])
        return cls(sent(scales[0].columns, device), sent(rows, device), tables)

    @property
    def planes(self) -> int:
        """Number of planes, U."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens of a plane, T."""
        return self.rows.shape[1]

    @property
    def dims(self) -> int:
        """Number of columns of a plane, D."""
        return len(self.columns)


@dataclass(frozen=True)
class Coded:
    """Streams in device memory; plane u's stream is ``arena[places[u]:][:sizes[u]]``.

    Attributes:
        arena: uint8, the memory in which all streams lie.
        places: int64 ``[U + 1]``, where each stream begins, and where the last one ends.
        sizes: int64 ``[U]``, bytes of each stream.
        checksums: int64 ``[U]``, the bits of the unsigned checksums of ``docs/format.md``.

    """

    arena: Tensor
    places: Tensor
    sizes: Tensor
    checksums: Tensor


def encode(gpu: Launcher, codes: Tensor, classes: Classes) -> Coded:
    """Return the streams of zigzag ``codes``, int16 ``[U, T, D]`` with the bits of uint16."""
    planes, tokens, dims = codes.shape
    size, rows, tables = tokens * dims, planes * tokens, classes.tables
    by_row = _by_row(rows)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=gpu.device)

    raw, starts, meta = empty(torch.int32, rows), empty(torch.int32, rows), empty(torch.int32, planes, META)
    totals = torch.zeros(planes, dtype=torch.int64, device=gpu.device)
    picks = empty(torch.int16, rows * dims)
    gpu.launch("scaled_rans/measure:measure", {}, *by_row, codes, classes.columns,
               classes.rows, rows, tokens, dims, tables.count, tables.costs, raw, totals, picks)  # fmt: skip
    gpu.launch("scaled_rans/measure:divide", {}, (planes, 1), 1024, 0, raw, totals, tokens, dims, starts, meta)
    most = max(1, size * PRECISION // 8 // GROUP_BYTES) + 1
    scratch, lengths = empty(torch.int16, planes * size), empty(torch.int32, planes, most)
    states = empty(torch.int32, planes, most, GROUP)
    gpu.launch("scaled_rans/encode:encode", {}, (-(-most // WARPS), planes), 32 * WARPS,
               8 * SYMBOLS * tables.count, picks, size, tables.count, tables.entries, meta, scratch, most, lengths,
               states)  # fmt: skip
    places, sizes = empty(torch.int64, planes + 1), empty(torch.int64, planes)
    gpu.launch("scaled_rans/emit:layout", {}, (1, 1), 32, 0, meta, lengths, planes, most, places, sizes)
    arena = empty(torch.uint8, planes * (4 * size + GROUP_OVERHEAD * most + 32))
    gpu.launch("scaled_rans/emit:emit", {}, (1 + most, planes), 256, 0, meta, lengths, most, states, scratch,
               size, places, arena)  # fmt: skip
    gpu.launch("scaled_rans/emit:raw", {}, *by_row, codes, rows, tokens, dims, raw, starts,
               meta, places, arena)  # fmt: skip
    return Coded(arena, places, sizes, checksums(gpu, places[:planes] + arena.data_ptr(), sizes))


def groups_of(heads: Sequence[bytes], sizes: Sequence[int], size: int) -> int:
    """Return how many groups a sound stream among these can have at most.

    Args:
        heads: the first 8 bytes of each stream.
        sizes: bytes of each stream.
        size: codes of a plane.

    """
    most = 1
    for head, length in zip(heads, sizes, strict=True):
        span = int.from_bytes(head[:4], "little")
        most = max(most, min(-(-size // span) if span else 1, length // GROUP_OVERHEAD))
    return most


def slack(size: int) -> int:
    """Return how many bytes must be readable behind streams of ``size`` codes: an unsound stream may ask for them."""
    return 2 * size + 4096


def decode(gpu: Launcher, streams: Tensor, sizes: Tensor, classes: Classes, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decode streams.

    Args:
        gpu: where the memory is.
        streams: int64 ``[U]``, addresses divisible by 4; :func:`slack` bytes beyond each stream must be readable.
        sizes: int64 ``[U]``, bytes.
        classes: what says each code's class.
        most: the number of groups that :func:`groups_of` returns for these streams.

    Returns:
        Codes int16 ``[U, T, D]`` with the bits of uint16; faults int32 ``[U]``, not 0 where a stream is unsound; and
        the streams' checksums int64 ``[U]``.

    """
    planes, tokens, dims, tables = classes.planes, classes.tokens, classes.dims, classes.tables
    rows, by_row = planes * tokens, _by_row(planes * tokens)
    meta = torch.empty(planes, META, dtype=torch.int32, device=gpu.device)
    bases = torch.empty(planes, most + 1, dtype=torch.int32, device=gpu.device)
    raw, starts = torch.empty(2, rows, dtype=torch.int32, device=gpu.device)
    cells = torch.empty(rows * dims, dtype=torch.uint8, device=gpu.device)
    codes = torch.empty(planes, tokens, dims, dtype=torch.int16, device=gpu.device)
    gpu.launch("scaled_rans/decode:heads", {}, (planes, 1), 1024, 0, streams, sizes, tokens * dims, most, bases,
               meta)  # fmt: skip
    gpu.launch("scaled_rans/decode:classify", {}, *by_row, classes.columns, classes.rows,
               rows, dims, tables.count, cells)  # fmt: skip
    gpu.launch("scaled_rans/decode:decode", {}, (-(-most // WARPS), planes), 32 * WARPS,
               WARPS * RING_BYTES + 4 * tables.decoding.numel() + 2 * tables.coarse.numel(), streams, bases, most,
               tokens * dims, tables.count, tables.decoding, tables.coarse, cells, meta)  # fmt: skip
    gpu.launch("scaled_rans/decode:tally", {}, *by_row, cells, rows, dims, codes, raw)
    gpu.launch("scaled_rans/decode:place", {}, (planes, 1), 1024, 0, streams, sizes, raw, tokens, starts, meta)
    gpu.launch("scaled_rans/decode:join", {}, *by_row, streams, rows, tokens, dims, raw,
               starts, meta, codes)  # fmt: skip
    return codes, meta[:, FAULT], checksums(gpu, streams, sizes)
