"""Where the bytes of a file went: by what is stored, by kind of stream, and by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpack.formats.captures import layer_of
from kvpack.formats.input import InputFile
from kvpack.formats.kinds import is_container
from kvpack.formats.safetensors import TensorFile
from kvpack.kvp import Container
from kvpack.kvp.inspection import LayerBytes, inspect_capture, inspect_container

TOGETHER = "keys and values"
"""What is stored by a codec that codes keys and values as one array."""

FRAME = "file"
"""What header, index and footer belong to."""


@dataclass(frozen=True)
class Piece:
    """The bytes of one kind of stream of ``what``: keys, values, both together, another tensor, or the file itself."""

    what: str
    stream: str
    size: int


@dataclass(frozen=True)
class Breakdown:
    """The bytes of a file, which ``pieces`` sum up to. The largest pieces come first.

    ``layers`` has the bytes of each layer. It is empty where a codec codes layers together, so that no byte belongs to
    one of them.
    """

    size: int
    pieces: tuple[Piece, ...]
    layers: tuple[LayerBytes, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return asdict(self)


def breakdown(path: Path, name: str | None = None) -> Breakdown:
    """Return where the bytes of a capture or of a ``.kvp`` file went. The errors are those of ``kvpack inspect``."""
    file = InputFile(path, name)
    if is_container(file.name, file):
        return _of_container(file.name, Container.of(file))
    header = TensorFile.of(file.name, file).header
    sizes: Counter[tuple[str, str]] = Counter({(FRAME, "header"): header.data_start})
    for spec in header.tensors:
        what = _family(spec.name) if layer_of(spec) is None else _kind(spec.name)
        sizes[what, "uncompressed"] += spec.nbytes
    return Breakdown(header.file_size, _pieces(sizes), tuple(inspect_capture(file.name, header).layers))


def _of_container(path: str, container: Container) -> Breakdown:
    parts = [part for part in container.parts if part.spec.tensor.layer is not None and all(part.spec.shape)]
    coded = {_kind(part.spec.tensor.name) for part in parts if part.streams}
    kinds = {_kind(part.spec.tensor.name) for part in parts}
    joined = any(not part.streams for part in parts)
    sizes: Counter[tuple[str, str]] = Counter({(FRAME, "header"): container.header_size})
    sizes[FRAME, "index and footer"] = container.index_size
    for part in container.parts:
        name = part.spec.tensor.name
        what = _family(name)
        if part.spec.tensor.layer is not None:
            what = _kind(name) if kinds <= coded else TOGETHER
        for record, _ in part.streams:
            sizes[what, container.stream_name(record)] += record.size
    layers = () if joined else tuple(inspect_container(path, container).layers)
    return Breakdown(container.size, _pieces(sizes), layers)


def _family(name: str) -> str:
    """Return the name of a tensor without its layer: ``queries`` for ``queries.7``."""
    return re.sub(r"\.[0-9]+$", "", name)


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[1]


def _pieces(sizes: Counter[tuple[str, str]]) -> tuple[Piece, ...]:
    found: Iterable[tuple[tuple[str, str], int]] = sizes.most_common()
    return tuple(Piece(what, stream, size) for (what, stream), size in found if size)
