"""The ``.kvp`` container: bytes, offsets and checksums; no stages, no numpy, no torch.

``docs/format.md`` is the specification; :mod:`layout` has its byte tables.
"""

from kvpack.container.layout import PartEntry, Record, layer_of, plan_parts
from kvpack.container.reader import Container
from kvpack.container.writer import ContainerWriter

__all__ = ["Container", "ContainerWriter", "PartEntry", "Record", "layer_of", "plan_parts"]
