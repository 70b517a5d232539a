"""The compact form of a source header: what ``build_header`` needs to write the same header again.

A capture of 30 layers has a header of 6 KB, of which deflate leaves 1.2 KB, most of it offsets that follow from the
shapes. A file that stores tokens instead of a cache is not much larger than that. ``docs/format.md``, section "Compact
source headers", specifies the form.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import Any

from kvpack.errors import FormatError
from kvpack.formats.safetensors import ITEM_BITS, Header, build_header

Json = dict[str, Any]
Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype and declared shape."""

MAX_TENSORS = 1 << 14
"""The most tensors that a compact header may describe."""

MAX_NAME = 1 << 10
"""The longest name in a compact header, in characters."""

MAX_EXPANDED = 1 << 24
"""The most characters that the names and shapes of a compact header may have in all."""

_NUMBERED = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([^*]*)")


def compact(source: Header) -> Json | None:
    """Return the compact form of a header, or None if the header cannot be written again from it."""
    entries: list[Entry] = [(spec.name, spec.dtype, spec.declared_shape) for spec in source.tensors]
    if len(entries) > MAX_TENSORS or any("*" in name or len(name) > MAX_NAME for name, _, _ in entries):
        return None
    document = {"metadata": source.metadata, "tensors": _runs(entries)}
    return document if build_header(entries, source.metadata).raw == source.raw else None


def _runs(entries: list[Entry]) -> list[Any]:
    """Return the tensors as a list of triples, with the layers that are alike in one run."""
    layers: list[list[Entry]] = []
    for number, group in groupby(entries, lambda entry: _numbered(entry)[0]):
        if number != len(layers):
            break
        layers.append([_numbered(entry)[1] for entry in group])
    alike = next((i for i, layer in enumerate(layers) if layer != layers[0]), len(layers))
    run = [[alike, *layers[0]]] if alike > 1 else []
    return [*run, *entries[alike * len(layers[0]) if run else 0 :]]


def _numbered(entry: Entry) -> tuple[int | None, Entry]:
    """Return the layer's number of a tensor and its entry with ``*`` in the number's place, or None and the entry."""
    name, dtype, shape = entry
    found = _NUMBERED.fullmatch(name)
    return (int(found[1]), (f"layers.*.{found[2]}", dtype, shape)) if found else (None, entry)


def expand(document: Any) -> str:
    """Return the source header that a compact form describes.

    Raises:
        FormatError: The document is not a compact form, or it describes more than it may.

    """
    if not isinstance(document, dict) or set(document) != {"metadata", "tensors"}:
        raise FormatError("the source header is not {metadata, tensors}")
    metadata, items = document["metadata"], document["tensors"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("the source header's metadata is not a map of strings")
    if not isinstance(items, list) or sum(map(_count, items)) > MAX_TENSORS:
        raise FormatError(f"the source header does not list tensors, or more than {MAX_TENSORS}")
    if sum(map(_length, items)) > MAX_EXPANDED:
        raise FormatError("the source header is longer than its compact form may say")
    entries = [entry for item in items for entry in _expanded(item)]
    if len({name for name, _, _ in entries}) != len(entries):
        raise FormatError("the source header names a tensor twice")
    try:
        return build_header(entries, metadata).raw.decode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise FormatError("the source header has text that is not Unicode") from None


def _count(item: Any) -> int:
    """Return the number of tensors of an item: one, or those of a run."""
    if not isinstance(item, list) or not item:
        raise FormatError("the source header has an item that is neither a tensor nor a run")
    if isinstance(item[0], str):
        return 1
    if type(item[0]) is not int or not 1 <= item[0] <= MAX_TENSORS:
        raise FormatError("the source header has a run of an impossible length")
    return int(item[0]) * (len(item) - 1)


def _length(item: list[Any]) -> int:
    """Return the most characters that an item's names and shapes can have, without writing them."""
    times, run = (1, [item]) if isinstance(item[0], str) else (item[0], item[1:])
    entries = [_entry(one) for one in run]
    return int(times) * sum(len(name) + 4 * name.count("*") + 20 * len(shape) for name, _, shape in entries)


def _expanded(item: list[Any]) -> list[Entry]:
    if isinstance(item[0], str):
        return [_entry(item)]
    run = [_entry(one) for one in item[1:]]
    return [(name.replace("*", str(i)), dtype, shape) for i in range(item[0]) for name, dtype, shape in run]


def _entry(item: Any) -> Entry:
    if not isinstance(item, list) or len(item) != 3:
        raise FormatError("a tensor in the source header is not [name, dtype, shape]")
    name, dtype, shape = item
    sizes = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    if not isinstance(name, str) or len(name) > MAX_NAME or not isinstance(dtype, str) or not sizes:
        raise FormatError("a tensor in the source header has a name, dtype or shape of the wrong type")
    if dtype not in ITEM_BITS:
        raise FormatError(f"the source header has a tensor of the unknown dtype {dtype!r}")
    return name, dtype, tuple(shape)
