"""The ``.kvp`` container: bytes, offsets and checksums; no stages, no numpy, no torch.

``docs/format.md`` is the specification; :mod:`layout` has its byte tables.
"""

from kvpack.kvp.layout import PartEntry, Record, layer_of, plan_parts
from kvpack.kvp.reader import Container
from kvpack.kvp.writer import ContainerWriter

__all__ = ["Container", "ContainerWriter", "PartEntry", "Record", "layer_of", "plan_parts"]
