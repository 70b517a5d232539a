"""Files on a GPU: lossless, ``fisher``, KIVI's and TurboQuant's, through pinned memory or to tensors on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from kvpack.archive import Archive
from kvpack.container import layer_of
from kvpack.device.arrays import takes_planes
from kvpack.device.chunks import ChunkDecoder, ChunkEncoder, takes_chunk
from kvpack.device.lossless import Decoder, Encoder, parts_of, takes
from kvpack.device.planes import PlaneDecoder, PlaneEncoder
from kvpack.errors import UsageError
from kvpack.stages.device.host import AUTO_BYTES, find_gpu

if TYPE_CHECKING:
    import torch

    from kvpack.stages.device.launch import Launcher

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
    "to_device",
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


def to_device(archive: Archive, device: str = "cuda") -> dict[str, torch.Tensor]:
    """Every layer's keys and values as tensors on ``device``, by name: decoded there, not sent through main memory.

    What the kernels do not take is decoded by the CPU and sent.

    Raises:
        UsageError: there is no such GPU.
        CorruptError: the file is damaged.

    """
    import torch

    gpu, reason = find_gpu(device, AUTO_BYTES)
    if gpu is None:
        raise UsageError(f"no GPU for {device!r}: {reason or 'asked for the CPU'}")
    names = [name for name, spec in archive.tensors.items() if layer_of(spec) is not None]
    dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    out = {}
    for name, data in read(gpu, archive, names, fetch=False):
        if isinstance(data, np.ndarray):
            signed = np.ascontiguousarray(data).view(np.dtype(f"i{data.itemsize}"))
            out[name] = torch.from_numpy(signed).view(dtypes[archive.tensors[name].dtype]).to(gpu.device)
        else:
            out[name] = data
    return out
