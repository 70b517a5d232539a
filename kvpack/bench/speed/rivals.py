"""Measures other codecs on the same data: kvpack's kernels of TurboQuant and KIVI, and nvCOMP if it is installed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvpack.bench.speed.timing import Speed, seconds, speed, waited
from kvpack.gpu.kernels import affine
from kvpack.gpu.kernels import lloyd_max as turboquant
from kvpack.gpu.runtime.launch import Gpu


def turboquant_3(gpu: Gpu, tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """Yield the speeds of TurboQuant with rotation and packed 3-bit codes, in both directions."""
    vectors = torch.nan_to_num(tensors.view(torch.bfloat16), 0, 0, 0).reshape(-1, tensors.shape[-1])
    codes, norms = turboquant.compress(gpu, vectors, seed=1)
    size = 2 * vectors.numel()
    yield speed("turboquant-3 compress", data, size, seconds(lambda: turboquant.compress(gpu, vectors, seed=1)))
    yield speed("turboquant-3 decompress", data, size, seconds(lambda: turboquant.decompress(gpu, codes, norms, 1)))


def kivi(gpu: Gpu, tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """Yield the speeds of KIVI with packed codes in both directions.

    Keys are grouped along tokens, and values along dimensions.
    """
    vectors = torch.nan_to_num(tensors.view(torch.bfloat16), 0, 0, 0).reshape(-1, *tensors.shape[-2:])
    size = 2 * vectors.numel()
    for bits in (4, 2):
        for axis, kind in (("token", "keys"), ("channel", "values")):
            packed = affine.compress(gpu, vectors, bits, axis, step=bits)
            there = seconds(lambda: affine.compress(gpu, vectors, bits, axis, step=bits))  # noqa: B023 (It is called at once.)
            back = seconds(lambda: affine.decompress(gpu, *packed, bits, axis, step=bits))  # noqa: B023
            yield speed(f"kivi-{bits} {kind} compress", data, size, there)
            yield speed(f"kivi-{bits} {kind} decompress", data, size, back)


def nvcomp(tensors: torch.Tensor, data: str) -> Iterator[Speed]:
    """Yield the speeds of NVIDIA's ANS on the same bytes, if nvCOMP is installed (``pip install kvpack[nvcomp]``)."""
    try:
        from nvidia import nvcomp as library
    except ImportError:
        return
    size = 2 * tensors.numel()
    torch.cuda.empty_cache()
    for mode in ("<f2", "|u1"):
        codec = library.Codec(algorithm="ANS", data_type=mode)
        array = library.as_array(tensors.reshape(-1).view(torch.uint8))
        packed = codec.encode(array)
        remark = f"ratio {size / packed.buffer_size:.3f}, wall clock"
        yield speed(f"nvCOMP ANS {mode} compress", data, size, waited(codec.encode, array), remark)
        yield speed(f"nvCOMP ANS {mode} decompress", data, size, waited(codec.decode, packed), "wall clock")
