"""Show what a capture or a ``.kvp`` file holds, and how many bytes each part takes.

This module imports only the standard library, so that ``kvpack inspect`` starts fast.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvpack.cache.flops import network_of_capture
from kvpack.cache.metadata import parse_metadata, parse_values
from kvpack.errors import naming
from kvpack.formats.captures import layer_of
from kvpack.formats.input import InputFile
from kvpack.formats.kinds import is_container
from kvpack.formats.safetensors import Header, TensorFile
from kvpack.kvp import Container, PartEntry
from kvpack.kvp.features import names_of
from kvpack.kvp.header import FAST_TOKENS, runs_model


@dataclass(frozen=True)
class LayerBytes:
    """A layer's number of tokens, and the bytes of its keys' and values' streams (for a capture: of its tensors)."""

    layer: int
    tokens: int
    keys: int
    values: int
    bits_per_element: float


@dataclass(frozen=True)
class Inspection:
    """Everything that ``kvpack inspect`` shows. Sizes are in bytes.

    ``bits_per_element`` is the size of the file, without the streams of tensors other than keys and values, divided by
    the number of elements of keys and values. ``ratio`` is the original file's size divided by this file's size.
    ``features`` are the names of the critical features that a ``.kvp`` file uses. ``origin`` is the position of the
    first token in its text, if the file is a part of a text after which more may follow. ``runs_model`` says whether
    decoding runs the model, and ``decode_flops`` how many floating-point operations (:mod:`kvpack.cache.flops`) that
    takes: 0 where no model runs, None where the file does not record how large the model is. No model is run to find
    out.
    """

    path: str
    kind: str
    size: int
    original_size: int
    ratio: float
    bits_per_element: float | None
    identity: dict[str, Any]
    shapes: dict[str, list[str]]
    layers: list[LayerBytes]
    other_tensors: int
    codec: dict[str, Any] | None = None
    lossless: bool | None = None
    format: str | None = None
    features: list[str] = field(default_factory=list)
    writer: str | None = None
    profile: dict[str, str] | None = None
    chunk_tokens: int | None = None
    origin: int | None = None
    streams: dict[str, int] = field(default_factory=dict)
    header: int = 0
    index: int = 0
    carried_losslessly: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    runs_model: bool = False
    decode_flops: int | None = 0

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON types."""
        return asdict(self)


def inspect(path: Path, name: str | None = None, *, check: bool = False) -> Inspection:
    """Inspect the file ``path``, which the result and messages call ``name`` if that is given.

    With ``check``, also verify the checksum of every stream.

    Raises:
        FormatError: The file is neither a valid capture nor a valid ``.kvp`` file.
        UnsupportedError: The file was written by a newer kvpack, or has a dtype that kvpack does not know.

    """
    file = InputFile(path, name)
    if is_container(file.name, file):
        return inspect_container(file.name, Container.of(file), check=check)
    return inspect_capture(file.name, TensorFile.of(file.name, file).header)


def inspect_capture(path: str, header: Header) -> Inspection:
    """Return what an open capture's header says. ``path`` is the file's name."""
    sizes = Counter({spec.name: spec.nbytes for spec in header.tensors})
    layers = _layers(header, sizes)
    kv = sum(layer.keys + layer.values for layer in layers)
    return Inspection(
        path=path,
        kind="capture",
        size=header.file_size,
        original_size=header.file_size,
        ratio=1.0,
        bits_per_element=_bits(kv, header),
        identity=parse_values(header.metadata),
        shapes=_shapes(header),
        layers=layers,
        other_tensors=sum(sizes.values()) - kv,
        header=header.data_start,
    )


def inspect_container(path: str, container: Container, *, check: bool = False) -> Inspection:
    """Inspect an open ``.kvp`` file. ``path`` is its name. Errors are those of :func:`inspect`."""
    sizes: Counter[str] = Counter()
    streams: Counter[str] = Counter()
    for part in container.parts:
        for record, _ in part.streams:
            sizes[part.spec.tensor.name] += record.size
            streams[container.stream_name(record)] += record.size
        if check:
            with naming(path):
                container.verify(part)
    header = container.source
    layers = _layers(header, sizes)
    other = sum(sizes.values()) - sum(layer.keys + layer.values for layer in layers)
    replayed = runs_model(container.header.codecs[0])
    return Inspection(
        path=path,
        kind="kvp",
        size=container.size,
        original_size=header.file_size,
        ratio=header.file_size / container.size,
        bits_per_element=_bits(container.size - other, header),
        identity=parse_values(header.metadata),
        shapes=_shapes(header),
        layers=layers,
        other_tensors=other,
        codec=container.header.codecs[0],
        lossless=container.header.lossless,
        format=".".join(map(str, container.version)),
        features=names_of(container.critical),
        writer=container.header.writer,
        profile=container.header.profile,
        chunk_tokens=container.header.chunk_tokens,
        origin=container.header.origin,
        streams=dict(streams.most_common()),
        header=container.header_size,
        index=container.index_size,
        carried_losslessly=[p.spec.label for p in container.parts if _was_carried(p)],
        dropped=container.header.dropped,
        checksums={"header": "ok", "index": "ok", "streams": "ok" if check else "not checked (use --check)"},
        runs_model=replayed,
        decode_flops=_replay_flops(container.header.codecs[0], header, layers) if replayed else 0,
    )


def _replay_flops(codec: dict[str, Any], header: Header, layers: list[LayerBytes]) -> int | None:
    """Operations of running the model over all tokens, and before it over each token that the model itself codes.

    Chunks of tokens that fell back to another coder are counted as if the model coded them.
    """
    network = network_of_capture(parse_metadata(header.metadata))
    if network is None:
        return None
    tokens, configuration = max((layer.tokens for layer in layers), default=0), codec.get("configuration")
    chunk = configuration.get("token_chunk") if isinstance(configuration, dict) else None
    predicted = type(chunk) is int and chunk < FAST_TOKENS
    return network.prefill(tokens) + (network.prediction(tokens) if predicted else 0)


def _was_carried(part: PartEntry) -> bool:
    return part.spec.tensor.layer is not None and part.codec != 0


def _elements(header: Header) -> int:
    return sum(spec.elements for spec in header.tensors if layer_of(spec) is not None)


def _bits(size: int, header: Header) -> float | None:
    elements = _elements(header)
    return 8 * size / elements if elements else None


def _shapes(header: Header) -> dict[str, list[str]]:
    """Return the tensors' names by ``dtype[shape]``, so that equal layers take one line."""
    shapes: dict[str, list[str]] = {}
    for spec in header.tensors:
        shapes.setdefault(f"{spec.dtype}{list(spec.declared_shape)}", []).append(spec.name)
    return shapes


def _layers(header: Header, sizes: Counter[str]) -> list[LayerBytes]:
    rows: dict[int, dict[str, Any]] = {}
    for spec in header.tensors:
        layer = layer_of(spec)
        if layer is None:
            continue
        row = rows.setdefault(layer, {"keys": 0, "values": 0, "tokens": spec.shape[1], "elements": 0})
        row[spec.name.rsplit(".", 1)[1]] = sizes[spec.name]
        row["elements"] += spec.elements
    return [
        LayerBytes(
            layer,
            row["tokens"],
            row["keys"],
            row["values"],
            8 * (row["keys"] + row["values"]) / max(row["elements"], 1),
        )
        for layer, row in sorted(rows.items())
    ]
