"""How much memory decoding a block takes, and how much it may take.

Blocks of a file that kvpack wrote are small, but a file from elsewhere may hold one part of any size. So the size is
compared with a limit before a block is decoded, and the message says what to do.
"""

from __future__ import annotations

import os
from pathlib import Path

from kvpack.cache import WindowSpec
from kvpack.codecs.protocol import Codec
from kvpack.errors import KvpackError

SHARE = 0.5
"""The share of the machine's memory that decoding may take if the user gives no limit."""

EXACT_COST, LOSSY_COST = 3, 10
"""Bytes that decoding holds at once for each byte of a block: of bit patterns alone, and with values in float32."""

LEAST = 64 << 20
"""Blocks that take no more than this are decoded whatever the limit is."""

_CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or the limit of its control group."""
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        whole = 4 << 30
    try:
        own = int(_CGROUP.read_text())
    except (OSError, ValueError):  # there is none, or it says "max"
        return whole
    return min(whole, own)


def default_limit() -> int:
    """Return the most bytes that decoding may take if the user gives no limit."""
    return int(machine_memory() * SHARE)


def working_bytes(block: WindowSpec, codec: Codec) -> int:
    """Return about how many bytes decoding a block takes."""
    return block.nbytes * (EXACT_COST if codec.lossless else LOSSY_COST)


def require_memory(block: WindowSpec, codec: Codec, limit: int) -> None:
    """Check that a block can be decoded within ``limit`` bytes.

    Raises:
        KvpackError: It takes more.

    """
    needed = working_bytes(block, codec)
    if needed > max(limit, LEAST):
        mib = -(-needed // (1 << 20))
        raise KvpackError(
            f"decoding {block.parts[0].label} takes about {mib} MiB of memory, and the limit is {limit >> 20} MiB: "
            f"give --memlimit {mib}M, or use a machine with more memory"
        )
