"""Read and show text that somebody else may have made: one parser for JSON headers, and one way to print names.

A header is parsed only after its structure was counted, so a small file cannot make Python build millions of objects,
recurse deeply or convert a number of thousands of digits. The counting is done by the C code of ``re`` and ``bytes``,
and takes time in proportion to the header. This module uses only the standard library.
"""

from __future__ import annotations

import json
import re
from typing import Any

from kvpack.errors import FormatError

MAX_DEPTH = 64
"""The most lists and objects that may lie within each other."""

MAX_DIGITS = 64
"""The most digits of a number. Sizes and offsets have at most 19."""

MAX_VALUES = 1 << 24
"""The most values (members of objects and items of lists) in a document, whatever its size."""

FEW_VALUES = 1 << 12
"""A document may have as many values as this, however small the file is that holds it."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A string, or what is left of the text if the string does not end. It never has to be tried twice."""

_PAIR = re.compile(rb"\[\]|\{\}")
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""What there is, escaped or not, in text with half of a surrogate pair. Whole pairs that are escaped have it too."""

_BRACKETS = b"[]{}"
_OTHERS = bytes(set(range(256)) - set(_BRACKETS))


def parse_json(raw: bytes, what: str, most: int = MAX_VALUES) -> Any:
    """Parse a JSON document in UTF-8 that has at most ``most`` values. Messages call it ``what``.

    Raises:
        FormatError: It is not JSON; it is nested more deeply than :data:`MAX_DEPTH`; it has more values than it may, a
            number of more than :data:`MAX_DIGITS` digits, a number that is not finite, a key twice in one object, or
            text that is not Unicode (half of a surrogate pair).

    """
    structure = _STRING.sub(b"", raw)
    values = sum(map(structure.count, (b",", b":", b"[", b"{")))
    if values > min(most, MAX_VALUES):
        raise FormatError(f"{what}: has {values} values, more than a file of this size may have")
    if _LONG_NUMBER.search(structure):
        raise FormatError(f"{what}: has a number of more than {MAX_DIGITS} digits")
    _require_shallow(structure, what)
    try:
        document = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error})") from None
    if not is_unicode(document, raw):
        raise FormatError(f"{what}: not valid JSON (text that is not Unicode)")
    return document


def is_unicode(document: Any, raw: bytes) -> bool:
    """Return whether a document that was parsed from ``raw`` has no half of a surrogate pair, so it can be encoded."""
    if not _HALF_OF_A_PAIR.search(raw):
        return True
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def values_for(size: int) -> int:
    """Return how many values a header may have that takes ``size`` bytes of a file, deflated or not."""
    return FEW_VALUES + 64 * size


def _require_shallow(structure: bytes, what: str) -> None:
    """Take away the innermost brackets again and again; what is nested too deeply is left.

    Of brackets that are nested m deep at most, at least one pair in m is innermost. So if a round takes away less, the
    document is too deep, and no more rounds are made.
    """
    left = structure.translate(None, _OTHERS)
    for rounds in range(MAX_DEPTH, 0, -1):
        if not left:
            return
        less = _PAIR.sub(b"", left)
        if (len(left) - len(less)) * rounds < len(left):
            break
        left = less
    if left:
        raise FormatError(f"{what}: not valid JSON (brackets that do not match, or nested more than {MAX_DEPTH} deep)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


def printable(text: str) -> str:
    r"""Return ``text`` with every character escaped that is not printable: ``\x1b``, ``\n``, ``\u202e``, ``\ud800``.

    Names, metadata and messages from files go through this function before they reach a terminal, where control
    characters could move the cursor, change colours or retitle the window.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
