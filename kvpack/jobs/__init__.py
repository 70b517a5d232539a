"""What kvpack does with files, for programs: the command line is a thin layer over this."""

from kvpack.jobs.compress import PROBES, Compressed, Planned, Write, compress, compress_many, differing_parts, plan
from kvpack.jobs.decompress import Selection, check, decompress

__all__ = [
    "PROBES",
    "Compressed",
    "Planned",
    "Selection",
    "Write",
    "check",
    "compress",
    "compress_many",
    "decompress",
    "differing_parts",
    "plan",
]
