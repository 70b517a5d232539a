"""``fisher`` from device to device, on a long capture."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch

from kvpack.bench.speed.given import Given
from kvpack.bench.speed.made import CODEC
from kvpack.bench.speed.timing import Speed, Timed, by_kernel, seconds, speed
from kvpack.gpu.engine.fisher_kernels import Coefficients, FisherKernels
from kvpack.gpu.runtime.tensors import product


def rows(gpu: Timed, one: Given) -> Iterator[Speed]:
    """Compress and decompress, whole and kernel by kernel; what comes back is checked before anything is timed."""
    given, chunk, part = one.tensors, one.chunk, one.part
    tensors, heads, tokens, dims = given.shape
    units, kernels = tokens // chunk, FisherKernels(gpu, CODEC.keys, part)
    out = torch.full_like(given, float("nan"))
    places = torch.arange(tensors, device=gpu.device) * given[0].numel() * 2
    offsets = places[None] + torch.arange(units, device=gpu.device)[:, None] * (2 * chunk * dims)
    shape, stride, levels = (heads, chunk, dims), tokens * dims, kernels.levels(0, units, chunk, one.mass)

    def compress() -> Coefficients:
        return kernels.compress(offsets + given.data_ptr(), shape, stride, 0, levels)

    done = compress()
    coded, shifts, size = done.coded, done.shifts.cpu().numpy(), 2 * given.numel()
    arena = torch.cat([coded.arena[: int(coded.places[-1])], coded.arena.new_zeros(4 * chunk * kernels.rank)])
    streams, groups = coded.places[:-1] + arena.data_ptr(), chunk * kernels.rank * 14 // 8 // 12288 + 2

    def decompress() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return kernels.decompress(
            streams, coded.sizes, groups, offsets + out.data_ptr(), shape, stride, 0, levels, shifts
        )

    unsound, sums, nonfinite = decompress()
    error = float((out - given).float().square().mean() / given.float().square().mean())
    unlike = not torch.equal(sums, coded.checksums) or not error < one.worst
    if done.faults.any() or unsound.any() or nonfinite.any() or unlike:
        raise RuntimeError(f"{one.name}: what comes back is not near what went in ({error}, at most {one.worst})")
    label = f"{one.name}, {units} x {chunk}, R {kernels.rank}"
    bits = 8 * int(coded.sizes.sum()) / given.numel()
    yield speed("fisher compress", label, size, seconds(compress), f"{bits:.4f} bits per element, error {error:.4f}")
    yield speed("fisher decompress", label, size, seconds(decompress))
    for what, function in (("fisher compress", compress), ("fisher decompress", decompress)):
        yield speed(f"{what}, two streams", label, size, seconds(function, streams=2))
    for way, function in (("compress", compress), ("decompress", decompress)):
        for kernel, times in by_kernel(gpu, function).items():
            yield speed(f"  {way}: {kernel}", label, size, times, f"{median(times) * 1e6:.0f} us")
    yield from _products(kernels, tokens, label, size)


def _products(kernels: FisherKernels, tokens: int, label: str, size: int) -> Iterator[Speed]:
    """The matrix products alone."""
    m = kernels.matrices
    told, width, windows = m.told.shape[0], m.prediction.width, m.groups[-1].window.stop
    stack, coordinates = (torch.randn(tokens, n, device=m.means.device).half() for n in (m.size + told, windows))
    inputs, rows = stack[:, m.size : m.size + width].contiguous(), stack[:, : m.size].contiguous()
    z = torch.empty(tokens, m.rank, device=m.means.device)

    def analyse() -> None:
        product(z[:, : m.shared], stack[:, : len(m.common)], m.common)
        product(z[:, m.shared :], stack[:, m.size :], m.told)
        for group in m.groups:
            product(z[:, group.own], stack[:, group.columns], group.analysis, add=True)

    def predict() -> None:
        product(inputs[:, m.prediction.inputs :], inputs[:, : m.prediction.inputs], m.prediction.hidden)
        product(z, inputs, m.prediction.weights)

    def synthesise() -> None:
        for group in m.groups:
            product(rows[:, group.columns], coordinates[:, group.window], group.synthesis, scale=2.0**-20)

    analysis = m.common.numel() + m.told.numel() + sum(group.analysis.numel() for group in m.groups)
    for name, function, entries in (
        ("compress: project", analyse, analysis),
        ("decompress: predict", predict, m.prediction.hidden.numel() + m.prediction.weights.numel()),
        ("decompress: synthesis", synthesise, sum(group.synthesis.numel() for group in m.groups)),
    ):
        times = seconds(function)
        middle, flops = median(times), 2 * tokens * entries
        yield speed(f"  {name}", label, size, times, f"{middle * 1e6:.0f} us, {flops / middle / 1e12:.0f} TFLOP/s")
