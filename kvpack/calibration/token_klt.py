"""Learns the basis of ``token_klt``: means, whitening, common directions and directions of layer groups.

``docs/fisher.md`` derives the method. Data are processed one sequence at a time. For P elements per token, R
coordinates and N tokens, this takes N * P float16 numbers and O(P R) memory, and O(N P R) time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.gradients import rows_of
from kvpack.calibration.prediction import Arrays, Ridge, embedded, pack, unpack
from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.transforms.token_klt.model import dual, layer_group_basis

DAMPING = 0.1
"""Damping of F, relative to its mean diagonal; directions without a measured gradient still matter a little."""

BASIS_TOKENS = 65536
ITERATIONS = 3
OVERSAMPLED = 64

GROUPS = 6
"""Number of layer groups that have their own directions."""

LOCAL_SHARE = 7 / 15
"""Number of directions of a group relative to the number of common directions."""

BASIS_STEP = 0.01
"""Rounding step of an element's share in a direction, relative to the element's standard deviation.

This bounds the noise in the elements themselves. A bound in whitened space would allow noise in directions in which
caches do not vary.
"""


@dataclass(frozen=True)
class Whitened:
    """Centres and whitens rows.

    Attributes:
        mean: mean of each of the S sinks, then the mean of all other tokens, ``[S + 1, P]``.
        whiten: whitening matrix of each block of D elements, ``[B, D, D]``.

    """

    mean: torch.Tensor
    whiten: torch.Tensor

    def rows(self, sample: Sample, sequence: int) -> torch.Tensor:
        """Return the whitened rows ``[T - SKIPPED, P]`` of a sequence."""
        return self.whitened(self.centred(sample, sequence))

    def whitened(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whitened form of centred rows ``[n, P]``."""
        blocks, dims, _ = self.whiten.shape
        rows: torch.Tensor = torch.einsum("tbd,bde->tbe", x.reshape(-1, blocks, dims), self.whiten)
        return rows.reshape(x.shape)

    def centred(self, sample: Sample, sequence: int) -> torch.Tensor:
        """Return the centred rows ``[T - SKIPPED, P]`` of a sequence, not whitened."""
        return rows_of(sample, sequence, self.mean.device)[SKIPPED:] - self.mean[-1]

    def unwhitened(self, rows: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`whitened` for rows ``[n, P]``."""
        blocks, dims, _ = self.whiten.shape
        inverse = torch.linalg.inv(self.whiten.double()).float()
        found: torch.Tensor = torch.einsum("tbd,bde->tbe", rows.reshape(-1, blocks, dims), inverse)
        return found.reshape(rows.shape)


def whitening(sample: Sample, sequences: list[int], fisher: torch.Tensor, sinks: int) -> Whitened:
    """Return the means of the sequences, and the symmetric square root of the damped F as whitening."""
    device = fisher.device
    size = sample.size
    total = torch.zeros(sinks + 1, size, dtype=torch.float64, device=device)
    for s in sequences:
        x = rows_of(sample, s, device).double()
        total += torch.cat([x[:sinks], x[SKIPPED:].mean(0, keepdim=True)])
    mean = (total / len(sequences)).float()
    scale = fisher.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped = fisher.double() / scale[:, None, None] + DAMPING * torch.eye(fisher.shape[1], device=device)
    values, vectors = torch.linalg.eigh(damped)
    root = (vectors * values.clamp_min(DAMPING / 2).sqrt()[:, None]) @ vectors.transpose(1, 2)
    return Whitened(mean.half().float(), root.float() * scale.sqrt().float()[:, None, None])


def leading_directions(
    spread: Callable[[torch.Tensor], torch.Tensor], size: int, rank: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the leading eigenvectors ``[P, R]`` and eigenvalues ``[R]`` of a covariance.

    ``spread`` multiplies a matrix ``[P, n]`` by the covariance. The method is subspace iteration from a random start
    (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4), which takes O(N P R) time and no P x P matrix.
    """
    rank = min(rank, size)
    width = min(size, rank + OVERSAMPLED)
    basis = torch.randn(size, width, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(ITERATIONS):
        basis = spread(torch.linalg.qr(basis).Q)
    basis = torch.linalg.qr(basis).Q
    small = (basis.T @ spread(basis)).double()
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    chosen: torch.Tensor = (basis.double() @ vectors[:, width - rank :]).float().flip(1)
    return chosen, values[width - rank :].flip(0)


def learn(
    sample: Sample, sequences: list[int], fisher: torch.Tensor, sinks: int, table: torch.Tensor, rank: int
) -> Iterator[tuple[str, Arrays]]:
    """Yield the arrays of a profile's section, except the prediction: a description of the step, and arrays by name."""
    white = whitening(sample, sequences, fisher, sinks)
    dims = white.whiten.shape[1]
    step = (white.whiten.abs().amax(1) / 127).clamp_min(1e-30).cpu().numpy()
    packed = pack("whiten", white.whiten.reshape(-1, dims).cpu().numpy(), step)
    rounded = torch.from_numpy(unpack(packed, "whiten")).to(fisher.device)
    white = Whitened(white.mean, rounded.reshape(white.whiten.shape))
    yield "means and whitening", {"mean": white.mean.half().cpu().numpy(), **packed}
    spread = _spread(sample, sequences, fisher)
    basis = pack("basis", *_directions(_axes(sample, sequences, white, table, rank), white, spread))
    yield "common directions", {"spread": spread, **basis}
    groups = np.arange(sample.layers, dtype=np.int32) * min(GROUPS, sample.layers) // sample.layers
    width = min(max(1, round(rank * LOCAL_SHARE)), 2 * sample.channels * int((groups == 0).sum()))
    synthesis = unpack(basis, "basis").T * spread
    local = _local(sample, sequences, white, synthesis, groups.astype(np.int32), width, spread)
    yield "local directions", {"groups": groups.astype(np.int32), **pack("local", *local)}


def coordinates(sample: Sample, sequences: list[int], arrays: Arrays, device: torch.device) -> list[torch.Tensor]:
    """Return the coordinates ``[T - SKIPPED, R]`` bfloat16 of each sequence, before the prediction is subtracted.

    They are those of a :class:`TokenModel` with the ``arrays`` of :func:`learn`.
    """
    spread, whiten = arrays["spread"], unpack(arrays, "whiten")
    synthesis = np.ascontiguousarray(unpack(arrays, "basis").T * spread)
    blocks = whiten.reshape(-1, whiten.shape[1], whiten.shape[1])
    local = layer_group_basis(blocks, synthesis, unpack(arrays, "local") * spread[:, None], arrays["groups"])
    common, half, at = dual(blocks, synthesis), sample.size // 2, len(synthesis)
    analysis = np.zeros((sample.size, at + local.width), np.float32)
    analysis[:, :at] = common
    for (a, b), mine in zip(local.bounds, local.analysis, strict=True):
        columns = slice(at, at + mine.shape[1])
        analysis[a:b, columns], analysis[half + a : half + b, columns] = mine[: b - a], mine[b - a :]
        at += mine.shape[1]
    analysis[:, len(synthesis) :] -= common @ local.cross
    project, mean = (torch.from_numpy(np.asarray(a, np.float32)).to(device) for a in (analysis, arrays["mean"][-1]))
    return [((rows_of(sample, s, device)[SKIPPED:] - mean) @ project).to(torch.bfloat16) for s in sequences]


Axes = tuple[torch.Tensor, torch.Tensor]
"""Directions in whitened space ``[P, R]``, and the root mean squares ``[R]`` of the data's coordinates along them."""


def _axes(sample: Sample, sequences: list[int], white: Whitened, table: torch.Tensor, rank: int) -> Axes:
    """Return the ``rank`` leading directions of the residual of a linear prediction from token ids."""
    first = Ridge()
    for s in sequences:
        first.add(embedded(table, sample.tokens[s]), white.rows(sample, s))
    weights = first.solve()
    stride = max(1, len(sequences) * sample.tokens.shape[1] // BASIS_TOKENS)
    rest, power = [], torch.zeros((), device=table.device)
    for s in sequences:
        some = slice(s % stride, None, stride)
        rest.append(white.rows(sample, s)[some] - embedded(table, sample.tokens[s])[some] @ weights)
        power += rest[-1].square().mean()
    unit = (power / len(rest)).sqrt().clamp_min(1e-30)
    rest = [(rows / unit).to(torch.bfloat16) for rows in rest]

    def spread(basis: torch.Tensor) -> torch.Tensor:
        narrow, total = basis.to(torch.bfloat16), torch.zeros_like(basis)
        for rows in rest:
            total += (rows.T @ (rows @ narrow)).float()
        return total

    leading, _ = leading_directions(spread, sample.size, rank, table.device)
    squares = torch.zeros(leading.shape[1], device=table.device)
    for s in sequences:
        squares += (white.rows(sample, s) @ leading).square().mean(0) / len(sequences)
    return leading, squares.sqrt()


def _directions(axes: Axes, white: Whitened, spread: Floats) -> tuple[Floats, Floats]:
    """Return each element's share of the directions ``[P, R]``, in units of ``spread``, and rounding steps ``[1, R]``.

    Directions with larger coordinates have finer steps.
    """
    directions, deviations = axes
    shares = np.asarray(white.unwhitened(directions.T).T.cpu().numpy() / spread[:, None], np.float32)
    step = np.maximum(BASIS_STEP / deviations.clamp_min(1e-15).cpu().numpy(), np.abs(shares).max(0) / 127)
    return shares, np.maximum(step, 1e-30)[None].astype(np.float32)


def _local(
    sample: Sample,
    sequences: list[int],
    white: Whitened,
    synthesis: Floats,
    groups: NDArray[np.int32],
    width: int,
    spread: Floats,
) -> tuple[Floats, Floats]:
    """Return the ``width`` leading directions of each layer group, in the form of :func:`_directions`.

    They are the directions of what the common ``synthesis`` ``[R, P]`` leaves.
    """
    device, half = white.mean.device, sample.size // 2
    layer = half // len(groups)
    analysis = torch.from_numpy(dual(white.whiten.cpu().numpy(), synthesis)).to(device)
    back = torch.from_numpy(synthesis).to(device)
    members = [torch.from_numpy(np.flatnonzero(groups == g)).to(device) for g in range(int(groups[-1]) + 1)]
    elements = [(g[:, None] * layer + torch.arange(layer, device=device)).reshape(-1) for g in members]
    elements = [torch.cat([e, half + e]) for e in elements]
    totals = [torch.zeros(len(e), len(e), device=device) for e in elements]
    for s in sequences:
        rows = white.centred(sample, s)
        rest = white.whitened(rows - (rows @ analysis) @ back)
        for total, e in zip(totals, elements, strict=True):
            total.add_(rest[:, e].T @ rest[:, e], alpha=1 / (len(rest) * len(sequences)))
    found, deviations = torch.zeros(sample.size, width, device=device), torch.zeros(width, device=device)
    for total, e in zip(totals, elements, strict=True):
        vectors, values = leading_directions(partial(torch.matmul, total), len(e), width, device)
        found[e] = vectors
        deviations += values.clamp_min(0).sqrt().float() / len(totals)
    return _directions((found, deviations), white, spread)


def _spread(sample: Sample, sequences: list[int], fisher: torch.Tensor) -> Floats:
    """Return the unit ``[P]`` in which each element's share is rounded.

    It is the element's standard deviation, divided by the fourth root of the mean harm of rounding errors in its head.
    This moves noise to where it does less harm, within bounds.
    """
    total, power = (torch.zeros(sample.size, dtype=torch.float64, device=fisher.device) for _ in range(2))
    for s in sequences:
        x = rows_of(sample, s, fisher.device)[SKIPPED:].double()
        total += x.mean(0) / len(sequences)
        power += x.square().mean(0) / len(sequences)
    variance = (power - total.square()).clamp_min(1e-12)
    weights = fisher.diagonal(dim1=1, dim2=2).double()
    weights = weights + DAMPING * weights.mean(1, keepdim=True)
    harm = (variance.reshape(weights.shape) * weights).mean(1).clamp_min(1e-30)
    relative = (harm / harm.log().mean().exp()) ** -0.25
    found: Floats = (variance.sqrt() * relative.repeat_interleave(weights.shape[1])).float().cpu().numpy()
    return found
