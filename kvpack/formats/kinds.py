"""Tell by the first bytes of a file what it is, so that a wrong file is answered by what it is instead."""

from __future__ import annotations

from kvpack.errors import FormatError
from kvpack.formats.input import Source

KVP = b"\x89KVP"
"""A ``.kvp`` file begins with these bytes. :data:`kvpack.kvp.layout.MAGIC` has them all."""

_ENOUGH = 9
"""The bytes that are looked at: a safetensors file has the ``{`` of its header behind eight bytes of its length."""


def begins(source: Source) -> bytes:
    """Return the first bytes of a file, enough for :func:`is_container` and :func:`instead`."""
    return bytes(source.read(0, min(_ENOUGH, source.size)))


def is_container(name: str, source: Source) -> bool:
    """Return whether a file is a ``.kvp`` file. If not, it is a safetensors file. Messages call it ``name``.

    Raises:
        FormatError: It is neither.

    """
    start = begins(source)
    if not start.startswith(KVP) and not is_safetensors(start):
        raise FormatError(f"{name}: neither a .kvp file nor a capture (a safetensors file){instead(start)}")
    return start.startswith(KVP)


def instead(start: bytes) -> str:
    """Return what a file that is not what it should be is instead, to end a message with, or nothing if unknown."""
    if not start:
        return ": it is empty"
    if start.startswith(KVP):
        return ": it is a .kvp file (kvpack decompress gives the capture)"
    return ": it is a safetensors file, as captures are" if is_safetensors(start) else ""


def is_safetensors(start: bytes) -> bool:
    """Return whether a file that begins so may be a safetensors file."""
    return len(start) >= _ENOUGH and start[6:9] == b"\0\0{"  # no header has 2^48 bytes
