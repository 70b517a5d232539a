"""A small capture that has tensors of every dtype that format 1.1 has added."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvpack.formats.safetensors import Header, build_header

TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "layers.0.keys": ("BF16", (2, 40, 8)),
    "layers.0.values": ("BF16", (2, 40, 8)),
    "tokens": ("I32", (40,)),
    "four": ("F4", (3, 5, 6)),
    "four.column": ("F4", (2, 1)),
    "four.empty": ("F4", (2, 0)),
    "six.e2m3": ("F6_E2M3", (5, 4)),
    "six.e3m2": ("F6_E3M2", (4, 3, 3)),
    "layers.0.scales": ("F8_E4M3FNUZ", (2, 40, 1)),
    "eight.e5m2fnuz": ("F8_E5M2FNUZ", (7,)),
    "complex": ("C64", (3, 5)),
    "complex.scalar": ("C64", ()),
    "layers.1.keys": ("F4", (2, 3, 4)),
}
"""Each tensor's dtype and its shape in elements. The last has a layer's name, but its dtype makes it another tensor."""


def contents() -> tuple[Header, bytes]:
    """The capture's header and its data, which are the same every time."""
    header = build_header([(name, *entry) for name, entry in TENSORS.items()], {"a": "ü"})
    rng = np.random.default_rng(11)
    pieces = [rng.integers(0, 256, spec.nbytes, np.uint8).tobytes() for spec in header.tensors]
    ordinary = (rng.standard_normal(2 * 40 * 8).astype(np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    data = [ordinary if spec.dtype == "BF16" else piece for spec, piece in zip(header.tensors, pieces, strict=True)]
    return header, b"".join(data)


def write_newer(path: Path) -> Path:
    """Write the capture to ``path``."""
    header, data = contents()
    path.write_bytes(len(header.raw).to_bytes(8, "little") + header.raw + data)
    return path


def only(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    """A safetensors file of one tensor ``x``. It is built by hand, so that it may break the format."""
    raw = f'{{"x":{{"dtype":"{dtype}","shape":{list(shape)},"data_offsets":[0,{len(data)}]}}}}'.encode()
    return len(raw).to_bytes(8, "little") + raw + data
