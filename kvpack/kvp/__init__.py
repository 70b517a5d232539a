"""The ``.kvp`` container: bytes, offsets and checksums. It uses neither stages nor numpy nor torch.

``docs/format.md`` is the specification. :mod:`layout` has its byte tables.
"""

from kvpack.kvp.frame import FramePart, Stream
from kvpack.kvp.layout import PartEntry, Record
from kvpack.kvp.reader import Container
from kvpack.kvp.writer import ContainerWriter

__all__ = ["Container", "ContainerWriter", "FramePart", "PartEntry", "Record", "Stream"]
