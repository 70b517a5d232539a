"""Constants that kernels share with the Python code around them, in one place.

The function :func:`kvpack.gpu.runtime.source.source_of` puts ``#define`` lines for them in front of a kernel's source.
A kernel therefore never repeats a number that Python uses, too. The dictionaries are by folder of
``kvpack/gpu/kernels``; a name may mean something different in another folder.
"""

from __future__ import annotations

from kvpack.codecs.chain.entropy import rans, scaled_rans
from kvpack.codecs.chain.entropy.rans import reference as rans_reference
from kvpack.codecs.chain.entropy.rans import tables
from kvpack.codecs.chain.entropy.scaled_rans import reference as scaled_rans_reference
from kvpack.codecs.chain.quantizers.dead_zone import reference as dead_zone
from kvpack.codecs.chain.symbols import DIRECT, LARGEST, SMALLEST
from kvpack.codecs.chain.transforms.token_klt import model

COMMON = {
    "RING": 512,  # bytes of shared memory in which a decoding warp holds the words that come next
}
"""Constants of the sources in ``common``, which every folder may include."""

RANS = {
    # The int32 values that are known of each part's stream: how many there are, and which is where.
    "META": 16,
    "MODE": 0,
    "TABLES": 1,
    "ALPHABET": 2,
    "PER_LANE": 3,
    "GROUPS": 4,
    "LANES": 5,
    "SPREAD": 6,
    "SHORTEST": 7,
    "WORDS": 8,
    "SLOT_BYTES": 9,
    "FAULT": 10,
    # The stream as docs/format.md describes it.
    "PACKED": rans.PACKED,
    "CODED": rans.CODED,
    "HEAD": 16,  # bytes of a coded stream's head
    "LOW": rans_reference.LOW,
    "TOTAL": tables.TOTAL,
    "REST": tables.REST,
    "LEVEL_COUNT": len(tables.LEVELS),
    "ROUNDS": tables.ROUNDS,
    # Sizes of the arrays that kernels hand to each other.
    "MAX_TABLES": tables.MAX_TABLES,
    "MAX_SYMBOLS": rans.MAX_SYMBOLS,
    "MAX_ENTRIES": tables.MAX_TABLES * rans.MAX_SYMBOLS,
    "MAX_SLOTS": tables.TOTAL + tables.TOTAL // 16,  # of one decoding table: single slots, and runs of 16 slots
    "SCAN_THREADS": 512,  # threads of a block of scan.cu
    "ENCODE_WARPS": 8,  # groups that a block of encode.cu encodes at most
}

SCALED_RANS = {
    # The int32 values that are known of each plane's stream: how many there are, and which is where.
    "META": 8,
    "SPAN": 0,
    "GROUPS": 1,
    "RAW_BYTES": 2,
    "WORDS": 3,
    "FAULT": 4,
    # The stream as docs/format.md describes it.
    "PRECISION": scaled_rans_reference.PRECISION,
    "LOW": scaled_rans_reference.LOW,
    "HEAD": 8,  # bytes of a stream's head
    "DIRECT": DIRECT,
    "GROUP_BYTES": scaled_rans.GROUP_BYTES,
    "GROUP_OVERHEAD": 4 * (1 + scaled_rans_reference.GROUP),  # bytes of a group's length and states
    # How the kernels are launched, and what they look up.
    "SYMBOLS": 64,  # entries that a table has room for
    "RUN": 64,  # slots whose first and last symbol the table `coarse` holds
    "WARPS": 4,  # groups that a block encodes or decodes
    "ROW_WARPS": 8,  # rows of a plane that a block takes, a warp each
}

DEAD_ZONE = {
    "THRESHOLDS": dead_zone.THRESHOLDS,
    "MAX_SHIFT": dead_zone.MAX_SHIFT,
    "SHIFT_COST": dead_zone.SHIFT_BITS * dead_zone.BIT,
    "LARGEST": LARGEST,
    "DIRECT": DIRECT,
    "BUCKETS": len(SMALLEST),
    "ROW_WARPS": 8,  # rows that a block of `restore` takes, and the most that a block of `quantize` takes
}

TOKEN_KLT = {
    "SPAN": 64,  # tokens whose sums a block of inputs.cu takes at once
    "LAGS": model.LAGS,
    "DECAYS": len(model.DECAYS),
    "PLACES": model.PLACES,
    "THREADS": 256,  # threads of every block
}

LLOYD_MAX = {
    "WARPS": 8,  # warps of a block
    "ROWS": 16,  # vectors that a warp multiplies at once, as mma.m16n8k16 has it
    "PADDING": 8,  # elements between two rows of a matrix in shared memory, against bank conflicts
}

AFFINE = {
    "GROUP": 32,  # values that share a scale and a zero
}

_FOLDERS = {
    "rans": RANS,
    "scaled_rans": SCALED_RANS,
    "dead_zone": DEAD_ZONE,
    "token_klt": TOKEN_KLT,
    "lloyd_max": LLOYD_MAX,
    "affine": AFFINE,
}


def constants_of(folder: str) -> dict[str, int]:
    """Return the names and values that the sources in a folder of ``kvpack/gpu/kernels`` are compiled with."""
    return {**COMMON, **_FOLDERS.get(folder, {})}
