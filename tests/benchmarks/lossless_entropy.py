"""How close the lossless codec comes to its model: bits per element, from the entropy to the whole file.

    python tests/benchmarks/lossless_entropy.py CAPTURE

Prints, for keys and values: the order-0 entropy of sign and exponent by channel (layer, head, dimension) plus raw
mantissa bits, with nothing counted for the statistics themselves; and what the streams of the ``lossless`` codec
take, tables and lanes included.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np

from kvpack import jobs
from kvpack.codecs.recipes import CODECS
from kvpack.formats.source import Capture
from kvpack.jobs.reader import KvpFile
from kvpack.kvp import Container, layer_of
from kvpack.numerics.floats import FLOAT_BITS


def channel_entropy(symbols: np.ndarray) -> float:
    """Bits of symbols ``[H, T, D]`` under each channel's own order-0 statistics."""
    columns = symbols.transpose(0, 2, 1).reshape(-1, symbols.shape[1])
    bits = 0.0
    for column in columns:
        counts = np.bincount(column)
        counts = counts[counts > 0]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    return bits


def main() -> None:
    capture = Capture.open(Path(sys.argv[1]))
    sink = io.BytesIO()
    jobs.compress(capture.file.path, sink, CODECS["lossless"])
    archive = KvpFile(Container(memoryview(sink.getvalue())))
    for kind in ("keys", "values"):
        specs = [s for s in capture.tensors.values() if layer_of(s) is not None and s.name.endswith(kind)]
        elements = sum(spec.elements for spec in specs)
        ideal = sum(
            channel_entropy(capture.read(s.name) >> FLOAT_BITS[s.dtype][1]) + s.elements * FLOAT_BITS[s.dtype][1]
            for s in specs
        )
        names = {spec.name for spec in specs}
        size = sum(r.size for p in archive.container.parts if p.spec.tensor.name in names for r, _ in p.streams)
        print(f"{kind}: entropy by channel {ideal / elements:.3f}, streams {8 * size / elements:.3f} bits/element")


if __name__ == "__main__":
    main()
