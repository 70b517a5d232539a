"""What ``token_klt`` learns: means, a whitening, a basis, a prediction from token ids (derived in ``docs/fisher.md``).

Everything large is streamed a sequence at a time; for P elements a token, R coordinates and N tokens, memory is
N * P halves and O(P R), time O(N P R).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.calibration.gradients import rows_of
from kvpack.stages.base import Floats, Part
from kvpack.stages.packed import pack_matrix, unpack_matrix
from kvpack.stages.transforms.token_klt.model import DECAYS, LAGS, context_inputs, dual, places, token_inputs

DAMPING = 1e-2
"""Of F's mean diagonal, added to it: directions without a measured gradient still matter a little."""

RIDGE = 1e-3
REACH = 192
"""Leading coordinates of a token's row that tell of later tokens (M)."""

EMBEDDED = 1024
"""At most so many dimensions of the model's token embeddings are used."""

ITERATIONS = 3
OVERSAMPLED = 64
BASIS_TOKENS = 65536
REFERENCE_STEP = 2.0 ** (-234 / 32)
"""What rounding of basis and table is held against: the step of ``fisher-4``."""

BASIS_STEP = 0.003
"""Rounding of an element's share in a direction, of the element's standard deviation. Noise is bounded where it would
be seen, in the elements themselves: in whitened space it would fall on directions that no cache goes in.
"""

TABLE_GROUPS = 32
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Whitened:
    """Means ``[S + 1, P]``: of each sink, and of the other tokens; whitening ``[B, D, D]``."""

    mean: torch.Tensor
    whiten: torch.Tensor

    def rows(self, sample: Sample, sequence: int) -> torch.Tensor:
        """Whitened rows ``[T - SKIPPED, P]`` of a sequence."""
        x = self.centred(sample, sequence)
        blocks, dims, _ = self.whiten.shape
        rows: torch.Tensor = torch.einsum("tbd,bde->tbe", x.reshape(-1, blocks, dims), self.whiten)
        return rows.reshape(x.shape)

    def centred(self, sample: Sample, sequence: int) -> torch.Tensor:
        """The same, not whitened."""
        return rows_of(sample, sequence, self.mean.device)[SKIPPED:] - self.mean[-1]

    def unwhitened(self, rows: torch.Tensor) -> torch.Tensor:
        """Of whitened rows ``[n, P]`` what they were."""
        blocks, dims, _ = self.whiten.shape
        inverse = torch.linalg.inv(self.whiten.double()).float()
        found: torch.Tensor = torch.einsum("tbd,bde->tbe", rows.reshape(-1, blocks, dims), inverse)
        return found.reshape(rows.shape)


def whitening(sample: Sample, sequences: list[int], fisher: torch.Tensor, sinks: int) -> Whitened:
    """Means of the sequences, and the symmetric square root of the damped F."""
    device = fisher.device
    size = sample.keys.shape[2] * 2
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


def embeddings(network: Any, sample: Sample, device: torch.device) -> torch.Tensor:
    """Normalised token embeddings ``[V, E]``, in at most :data:`EMBEDDED` principal directions of the sample."""
    table: torch.Tensor = network.get_input_embeddings().weight.detach().to(device).float()
    table = table / table.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    if table.shape[1] <= EMBEDDED:
        return table
    rows = table[torch.from_numpy(sample.tokens.reshape(-1)[:65536]).long().to(device)]
    vectors = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :EMBEDDED]
    projected: torch.Tensor = table @ vectors
    return projected


class Ridge:
    """Linear regression streamed in pieces."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self._gram: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """``[T, I]`` and ``[T, O]``."""
        self._gram = self._gram + inputs.T @ inputs
        self._cross = self._cross + inputs.T @ targets

    def solve(self) -> torch.Tensor:
        """``[I, O]``."""
        gram, cross = torch.as_tensor(self._gram).double(), torch.as_tensor(self._cross)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        solution: torch.Tensor = torch.linalg.solve(gram, cross.double()).float()
        return solution


def _first_inputs(table: torch.Tensor, tokens: NDArray[np.int32]) -> torch.Tensor:
    """Embeddings of each token, the one before it and a decaying mean of those before: ``[T - SKIPPED, 3 E + 3]``."""
    rows = table[torch.from_numpy(tokens).long().to(table.device)]
    behind = context_inputs(rows.cpu().numpy())[[0, LAGS + DECAYS.index(0.85)], SKIPPED:]
    parts = [rows[SKIPPED:], *torch.from_numpy(behind).to(rows.device)]
    return torch.cat([*parts, torch.from_numpy(places(SKIPPED, len(tokens))).to(rows.device)], dim=1)


def leading_directions(batches: list[torch.Tensor], rank: int, seed: int) -> torch.Tensor:
    """Leading eigenvectors ``[P, R]`` of the covariance of rows, ``[n, P]`` a batch.

    Subspace iteration from a random start (Halko, Martinsson & Tropp, arXiv 0909.4061, algorithm 4.4): O(N P R) time
    without a P x P matrix.
    """
    size = batches[0].shape[1]
    rank = min(rank, size)
    width = min(size, rank + OVERSAMPLED)
    device = batches[0].device
    basis = torch.randn(size, width, generator=torch.Generator().manual_seed(seed)).to(device)
    for _ in range(ITERATIONS):
        narrow = torch.linalg.qr(basis).Q.to(batches[0].dtype)
        basis = torch.zeros(size, width, device=device)
        for rows in batches:
            basis += (rows.T @ (rows @ narrow)).float()
    basis = torch.linalg.qr(basis).Q
    small = torch.zeros(width, width, device=device)
    for rows in batches:
        inner = (rows @ basis.to(rows.dtype)).float()
        small += inner.T @ inner
    vectors = torch.linalg.eigh(small.double()).eigenvectors[:, width - rank :]
    chosen: torch.Tensor = (basis.double() @ vectors).float().flip(1)
    return chosen


def learn(
    sample: Sample,
    sequences: list[int],
    fisher: torch.Tensor,
    sinks: int,
    table: torch.Tensor,
    rank: int,
    budget: int,
) -> Iterator[tuple[str, Arrays]]:
    """The arrays of a profile's section, in steps: what has been found, and arrays by their names within the section.

    ``budget`` is how many bytes the token table may take.
    """
    white = whitening(sample, sequences, fisher, sinks)
    dims = white.whiten.shape[1]
    step = (white.whiten.abs().amax(1) / 127).clamp_min(1e-30).cpu().numpy()
    packed = _packed("whiten", white.whiten.reshape(-1, dims).cpu().numpy(), step)
    rounded = torch.from_numpy(_unpacked(packed, "whiten")).to(fisher.device)
    white = Whitened(white.mean, rounded.reshape(white.whiten.shape))
    yield "means and whitening", {"mean": white.mean.half().cpu().numpy(), **packed}
    first = Ridge()
    for s in sequences:
        first.add(_first_inputs(table, sample.tokens[s]), white.rows(sample, s))
    weights = first.solve()
    span = _span(sample, sequences, white, table, weights, rank)
    coordinates = [white.rows(sample, s) @ span for s in sequences]
    turn, deviations = _principal_axes(sample, sequences, table, weights @ span, coordinates)
    basis = _rounded_basis(white.unwhitened((span @ turn).T).T, _spread(sample, sequences), deviations)
    yield f"{span.shape[1]} directions", basis
    synthesis = _unpacked(basis, "basis").T * basis["spread"]
    analysis = torch.from_numpy(dual(white.whiten.cpu().numpy(), synthesis)).to(table.device)
    coordinates = [white.centred(sample, s) @ analysis for s in sequences]
    vectors = _token_vectors(sample.tokens[sequences], table, weights[: table.shape[1]])
    vectors_packed = _rounded_table(vectors, sample.tokens[sequences], budget)
    yield "token table", vectors_packed
    used = _unpacked(vectors_packed, "table")[vectors_packed["order"]]
    yield "prediction", _prediction(sample, sequences, used, coordinates)


def _span(
    sample: Sample, sequences: list[int], white: Whitened, table: torch.Tensor, weights: torch.Tensor, rank: int
) -> torch.Tensor:
    """An orthonormal basis ``[P, R]`` of the ``rank`` leading directions of what the prediction leaves, and of all
    that a token's own embedding predicts: cut off, that would be missing wherever the token stands.
    """
    stride = max(1, len(sequences) * sample.tokens.shape[1] // BASIS_TOKENS)
    rest = []
    for s in sequences:
        some = slice(s % stride, None, stride)
        rest.append(white.rows(sample, s)[some] - _first_inputs(table, sample.tokens[s])[some] @ weights)
    unit = torch.stack([rows.square().mean() for rows in rest]).mean().sqrt().clamp_min(1e-30)
    leading = leading_directions([(rows / unit).to(torch.bfloat16) for rows in rest], rank, seed=0)
    own = weights[: table.shape[1]]
    both = torch.cat([leading, torch.linalg.qr(own.T).Q], dim=1)
    span: torch.Tensor = torch.linalg.qr(both[:, : both.shape[0]]).Q
    return span


def _principal_axes(
    sample: Sample, sequences: list[int], table: torch.Tensor, weights: torch.Tensor, coordinates: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotation ``[R, R]`` to the eigenvectors of what the prediction leaves, largest first, and the root mean squares
    ``[R]`` of the coordinates themselves.
    """
    size = weights.shape[1]
    left, whole = (torch.zeros(size, size, dtype=torch.float64, device=weights.device) for _ in range(2))
    for s, found in zip(sequences, coordinates, strict=True):
        rest = found - _first_inputs(table, sample.tokens[s]) @ weights
        left += (rest.T @ rest).double()
        whole += (found.T @ found).double()
    turn = torch.linalg.eigh(left).eigenvectors.flip(1)
    power = ((turn.T @ whole) * turn.T).sum(1) / sum(map(len, coordinates))
    return turn.float(), power.clamp_min(1e-30).sqrt().float()


def _spread(sample: Sample, sequences: list[int]) -> Floats:
    """Standard deviation of each element ``[P]``, about 0 between sequences' own means and all."""
    power = np.zeros(2 * sample.keys.shape[2])
    total = np.zeros_like(power)
    for s in sequences:
        x = rows_of(sample, s, "cpu").numpy()[SKIPPED:].astype(np.float64)
        power += np.square(x).mean(0) / len(sequences)
        total += x.mean(0) / len(sequences)
    return np.asarray(np.sqrt(np.maximum(power - np.square(total), 1e-12)), np.float32)


def _rounded_basis(synthesis: torch.Tensor, spread: Floats, deviations: torch.Tensor) -> Arrays:
    """Directions ``[P, R]``, over each element's deviation, rounded the finer the more their coordinates deviate."""
    shares = np.asarray(synthesis.cpu().numpy() / spread[:, None], np.float32)
    step = np.maximum(BASIS_STEP / deviations.cpu().numpy(), np.abs(shares).max(0) / 127)[None].astype(np.float32)
    return {"spread": spread, **_packed("basis", shares, step)}


def _token_vectors(tokens: NDArray[np.int32], table: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Of every token id what its embedding ``[V, E]`` predicts by ``own`` ``[E, P]``: ``[V, E]``, in principal axes."""
    counts = torch.bincount(torch.from_numpy(tokens.reshape(-1)).long(), minlength=len(table)).to(table.device).float()
    spread = (table.T * counts) @ table / counts.sum()
    values, turn = torch.linalg.eigh(spread.double())
    root = (turn * values.clamp_min(0).sqrt()) @ turn.T
    across = (own @ own.T).double()
    axes = torch.linalg.eigh(root @ across @ root).eigenvectors.flip(1)
    # own = left @ right with right orthonormal rows: coordinates in P are table @ left; axes turn them by importance
    lengths, turns = torch.linalg.eigh(across)
    left = turns * lengths.clamp_min(1e-30).sqrt()
    spun = torch.linalg.qr(left.T @ root @ axes).Q
    vectors: torch.Tensor = (table.double() @ left @ spun).float()
    return vectors


def _rounded_table(own: torch.Tensor, tokens: NDArray[np.int32], budget: int) -> Arrays:
    """Rows in groups by how often their tokens occur, rare ones rounded coarser, within ``budget`` bytes."""
    vocabulary = len(own)
    counts = np.bincount(tokens.reshape(-1), minlength=vocabulary)
    order = np.argsort(-counts, kind="stable")
    place = np.empty(vocabulary, np.int32)
    place[order] = np.arange(vocabulary)
    groups = min(TABLE_GROUPS, vocabulary)
    size = -(-vocabulary // groups)
    rows = np.zeros((groups * size, own.shape[1]), np.float32)
    rows[:vocabulary] = own.cpu().numpy()[order]
    often = np.zeros(groups * size)
    often[:vocabulary] = counts[order]
    share = (often.reshape(groups, size).mean(1) + 0.25) / (counts.sum() + 0.25 * vocabulary)
    widest = np.abs(rows).reshape(groups, size, -1).max(1)
    base, packed = REFERENCE_STEP / 2, None
    while packed is None or packed["table.codes"].size > budget:
        step = np.maximum(base * np.sqrt(share.max() / share)[:, None], widest / 127).astype(np.float32)
        packed = _packed("table", rows, np.maximum(step, 1e-30))
        base *= 1.25
        if base > 1e6 * REFERENCE_STEP:
            break
    return {"order": place, **packed}


def _packed(name: str, matrix: Floats, step: Floats) -> Arrays:
    """The arrays that :func:`_unpacked` reads."""
    return {f"{name}.{field}": array for field, array in pack_matrix(matrix, step).items()}


def _unpacked(arrays: Arrays, name: str) -> Floats:
    return unpack_matrix(Part("F32", (1, 0, 0), 0, 0, profile=arrays), name)


def _prediction(sample: Sample, sequences: list[int], table: Floats, coordinates: list[torch.Tensor]) -> Arrays:
    """What a token's own vector, those behind it and its place tell of its coordinates."""
    device = coordinates[0].device
    reach = min(REACH, table.shape[1])
    ridge = Ridge()
    for s, found in zip(sequences, coordinates, strict=True):
        inputs = token_inputs(table[sample.tokens[s]], reach, SKIPPED)
        ridge.add(torch.from_numpy(inputs).to(device), found)
    weights = ridge.solve().cpu().numpy()
    step = np.maximum(np.abs(weights).max(0, keepdims=True) / 127, 1e-30)
    return _packed("weights", weights, step)
