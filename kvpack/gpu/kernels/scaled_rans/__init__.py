"""``scaled_rans`` on a GPU: the same streams as ``cpu.py``, many planes of one shape a launch, nothing waited for.

What is the same for every code is done by passes over all of them, so that lanes, which wait for their own last step,
have little to do. Encoding: one pass says each code's class and symbol and sums what they will cost (``measure.cu``), a
warp encodes a group (``encode.cu``), streams are placed one behind another and filled (``emit.cu``). Decoding
(``decode.cu``): heads and lengths are checked, a pass says classes, a warp decodes a group's symbols, a pass makes them
codes, and where codes have raw bits another adds them.
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
"""Bytes that a group takes beside its words: its length and its 32 states."""
RING_BYTES = COMMON["RING"]
"""Bytes of shared memory in which a decoding warp holds the words that come next."""
MAX_TABLES = 64
MAX_ROWS, MAX_CODES = 1 << 15, 1 << 29
"""Tokens and codes a plane; raw bits of one are counted in 31 bits."""


def supports(tokens: int, dims: int, tables: int) -> bool:
    """Whether the kernels take planes ``[1, T, D]`` with so many tables."""
    return 0 < tokens <= MAX_ROWS and dims > 0 and tokens * dims <= MAX_CODES and tables <= MAX_TABLES


def _by_row(rows: int) -> tuple[tuple[int, int], int, int]:
    """Grid, threads of a block and shared memory of a kernel in which each warp takes one row."""
    return (-(-rows // ROW_WARPS), 1), 32 * ROW_WARPS, 0


@dataclass(frozen=True)
class Tables:
    """A profile's frequencies as kernels take them: ``costs`` int16, ``entries`` int64 to encode by, ``decoding`` int32
    to decode by, each ``[K, 64]``, and ``coarse`` int16 ``[K, 256]``: symbols of every 64 slots' first and last.
    """

    costs: Tensor
    entries: Tensor
    decoding: Tensor
    coarse: Tensor

    @classmethod
    def of(cls, frequencies: NDArray[np.int32], device: str) -> Tables:
        """From ``[K, 63]`` frequencies."""
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
        """K."""
        return len(self.costs)


@dataclass(frozen=True)
class Classes:
    """What says each code's class, in device memory: ``columns`` ``[D]`` and ``rows`` ``[U, T]`` of :class:`Scales`."""

    columns: Tensor
    rows: Tensor
    tables: Tables

    @classmethod
    def of(cls, scales: Sequence[Scales], tables: Tables, device: str) -> Classes:
        """Of planes of one shape, with the same columns and tables."""
        rows = np.stack([one.rows for one in scales])
        return cls(sent(scales[0].columns, device), sent(rows, device), tables)

    @property
    def planes(self) -> int:
        """U."""
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows.shape[1]

    @property
    def dims(self) -> int:
        """D."""
        return len(self.columns)


@dataclass(frozen=True)
class Coded:
    """Streams in device memory: plane u's is ``arena[places[u]:][:sizes[u]]``; checksums as in ``docs/format.md``."""

    arena: Tensor
    places: Tensor
    sizes: Tensor
    checksums: Tensor


def encode(gpu: Launcher, codes: Tensor, classes: Classes) -> Coded:
    """Streams of zigzag ``codes`` int16 (the bits of uint16) ``[U, T, D]``; waits for nothing."""
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
    """The most groups that streams with these first 8 bytes, for planes of ``size`` codes, can have and be sound."""
    most = 1
    for head, length in zip(heads, sizes, strict=True):
        span = int.from_bytes(head[:4], "little")
        most = max(most, min(-(-size // span) if span else 1, length // GROUP_OVERHEAD))
    return most


def slack(size: int) -> int:
    """Bytes that must be readable behind streams of planes of ``size`` codes: what an unsound one could ask for."""
    return 2 * size + 4096


def decode(gpu: Launcher, streams: Tensor, sizes: Tensor, classes: Classes, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int16 ``[U, T, D]``, faults int32 ``[U]`` (not 0 where a stream is unsound), and the streams' checksums.

    ``streams`` int64 addresses, divisible by 4, ``sizes`` int64 bytes ``[U]``; memory must be readable for
    :func:`slack` beyond any stream. ``most`` is :func:`groups_of`'s.
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
