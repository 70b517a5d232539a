"""Files on a GPU: lossless, ``fisher``, KIVI's and TurboQuant's, through pinned memory or to tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kvpack.gpu.engine.arrays import takes_planes
from kvpack.gpu.engine.chunks import ChunkDecoder, ChunkEncoder, takes_chunk
from kvpack.gpu.engine.lossless import Decoder, Encoder, parts_of, takes
from kvpack.gpu.engine.planes import PlaneDecoder, PlaneEncoder
from kvpack.jobs.reader import Archive
from kvpack.kvp import layer_of

if TYPE_CHECKING:
    from kvpack.gpu.runtime.launch import Launcher

__all__ = [
    "ChunkDecoder",
    "ChunkEncoder",
    "Decoder",
    "Encoder",
    "PlaneEncoder",
    "parts_of",
    "read",
    "takes",
    "takes_chunk",
    "takes_planes",
]


def read(gpu: Launcher, archive: Archive, names: Sequence[str], *, fetch: bool = True) -> Iterator[tuple[str, Any]]:
    """Names and tensors in order: bit patterns in main memory, or with ``fetch`` False bf16 in device memory.

    What the kernels do not take is decoded by the CPU, and comes as bit patterns.

    Raises:
        CorruptError: a checksum, the coding or the digest does not hold.
        MismatchError: the archive needs a profile, and has none.

    """
    chunks, planes, lossless = ChunkDecoder(gpu, archive), PlaneDecoder(gpu, archive), Decoder(gpu, archive)
    joint = chunks.takes()

    def reader(name: str) -> ChunkDecoder | PlaneDecoder | Decoder:
        if joint and layer_of(archive.tensors[name]) is not None:
            return chunks
        return planes if planes.takes(name) else lossless

    for one, run in groupby(names, key=reader):
        yield from one.read(list(run), fetch=fetch)
