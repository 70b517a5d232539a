"""The Python interface to what kvpack does with files. The command line is a thin layer over it."""

from kvpack.jobs.compression import PROBES, Compressed, CompressJob, Write, compress, compress_many, left_out, prepare
from kvpack.jobs.decompression import Selection, check, decoded, decompress, differing_parts
from kvpack.jobs.integrity import Damage, Integrity, Salvaged, examine, salvage
from kvpack.jobs.reader import KvpFile, open_cache
from kvpack.jobs.restoring import require_restorable
from kvpack.jobs.resume import require_compressed, require_decompressed

__all__ = [
    "PROBES",
    "CompressJob",
    "Compressed",
    "Damage",
    "Integrity",
    "KvpFile",
    "Salvaged",
    "Selection",
    "Write",
    "check",
    "compress",
    "compress_many",
    "decoded",
    "decompress",
    "differing_parts",
    "examine",
    "left_out",
    "open_cache",
    "prepare",
    "require_compressed",
    "require_decompressed",
    "require_restorable",
    "salvage",
]
