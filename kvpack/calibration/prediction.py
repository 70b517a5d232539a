"""Learns the prediction of ``token_klt`` from token ids: a table of token vectors, rectified units, linear weights.

The linear weights come from ridge regression on the rounded table and units that the decoder will have. Only the units
are trained by gradient descent (Adam, arXiv 1412.6980), on the residual of a linear prediction.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvpack.calibration.corpus import SKIPPED, Sample
from kvpack.codecs.chain.base import Floats, Part
from kvpack.codecs.chain.packed import pack_matrix, unpack_matrix
from kvpack.codecs.chain.transforms.token_klt.model import PLACES, places, token_inputs
from kvpack.codecs.context import DecodeContext

RIDGE = 1e-3
REACH = 192
"""Number of leading elements of a token's vector from which later tokens are predicted (M)."""

EMBEDDED = 1024
"""Largest number of dimensions of the model's token embeddings that are used."""

DECAY = 0.85
"""Decay per token of the mean of embeddings with which the basis and the table are learnt."""

TABLE_GROUPS = 32
REFERENCE_STEP = 2.0 ** (-234 / 32)
"""Step of ``fisher-4``, to which rounding errors and training errors are compared."""

TABLE_STEP = REFERENCE_STEP / 16
"""Rounding step of the vectors of the most frequent tokens, if the budget allows it."""

TABLE_TRIES = 74
"""Number of step sizes to try if the table exceeds the budget.

Each is a quarter wider than the one before; the widest is about a million times ``REFERENCE_STEP``.
"""

UNSEEN, RARITY = 1.0, 0.4
"""Offset and exponent of a token's rounding step: it is proportional to (count + ``UNSEEN``) ** -``RARITY``.

Other kinds of text have tokens that are rare in the corpus or missing from it. When one kind of text was left out, 3 to
9 % of its tokens did not occur in the others.
"""

RATE, BATCH = 1e-3, 4096
SHARE = 0.5
"""Exponent of the inputs' scale.

Normalized inputs are multiplied by this power of their original deviation, relative to the largest deviation. The last
axes of the token vectors vary little, so rounding errors of rare tokens are relatively large there.
"""

UNITS_NOISE = 0.02
"""Allowed noise in the input of a unit from rounding its weights, relative to the energy of the input."""

WEIGHTS_NOISE = 0.0006
"""Allowed noise in a prediction from rounding its weights, relative to the larger of the residual and the step."""

PRICE = 0.15
"""Price of a bit in squared steps when a profile's matrices are rounded."""

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PredictorOptions:
    """Options of the prediction: ``units`` rectified units, trained for ``steps`` steps."""

    units: int = 512
    steps: int = 100


def embeddings(network: Any, sample: Sample, device: torch.device) -> torch.Tensor:
    """Return normalized token embeddings ``[V, E]`` in at most :data:`EMBEDDED` principal directions of the sample."""
    table: torch.Tensor = network.get_input_embeddings().weight.detach().to(device).float()
    table = table / table.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    if table.shape[1] <= EMBEDDED:
        return table
    rows = table[torch.from_numpy(sample.tokens.reshape(-1)[:65536]).long().to(device)]
    vectors = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)[:, :EMBEDDED]
    projected: torch.Tensor = table @ vectors
    return projected


def embedded(table: torch.Tensor, tokens: NDArray[np.int32]) -> torch.Tensor:
    """Return linear inputs for each token, ``[T - SKIPPED, 3 * E + 3]``.

    They are its embedding, that of the token before it, a decaying mean up to the token, and functions of its position.
    """
    rows = table[torch.from_numpy(tokens).long().to(table.device)]
    ages = torch.arange(len(tokens), device=table.device)[:, None] - torch.arange(1, len(tokens) + 1).to(table.device)
    weights = torch.where(ages >= 0, DECAY ** ages.clamp_min(0).float(), 0.0)
    mean = (weights[SKIPPED:] / weights[SKIPPED:].sum(1, keepdim=True)) @ rows
    place = torch.from_numpy(places(SKIPPED, len(tokens))).to(rows.device)
    return torch.cat([rows[SKIPPED:], rows[SKIPPED - 1 : -1], mean, place], dim=1)


class Ridge:
    """Ridge regression whose data are added piece by piece."""

    def __init__(self) -> None:
        """Start without data."""
        self._gram: torch.Tensor | float = 0.0
        self._cross: torch.Tensor | float = 0.0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Add inputs ``[T, I]`` and targets ``[T, O]``."""
        self._gram = self._gram + inputs.T @ inputs
        self._cross = self._cross + inputs.T @ targets

    def solve(self, share: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weights ``[I, O]``; an input with a smaller ``share`` ``[I]`` has a larger penalty."""
        gram, cross = torch.as_tensor(self._gram).double(), torch.as_tensor(self._cross)
        held = torch.ones(len(gram), device=gram.device) if share is None else share**-2
        gram += RIDGE * gram.diagonal().mean() * torch.diag(held.double())
        solution: torch.Tensor = torch.linalg.solve(gram, cross.double()).float()
        return solution


def learn(
    tokens: NDArray[np.int32],
    coordinates: list[torch.Tensor],
    table: torch.Tensor,
    budget: int,
    options: PredictorOptions,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Arrays]]:
    """Yield the arrays of the prediction step by step: a description of the step, and its arrays by name.

    ``coordinates`` has the targets ``[T - SKIPPED, R]`` for each row of ``tokens`` ``[S, T]``. ``table`` ``[V, E]`` are
    the model's embeddings. The token vectors may take ``budget`` bytes.
    """
    first, left = Ridge(), torch.zeros(coordinates[0].shape[1], device=table.device)
    for ids, found in zip(tokens, coordinates, strict=True):
        first.add(embedded(table, ids), found.float())
    own = first.solve()
    for ids, found in zip(tokens, coordinates, strict=True):
        left += (found.float() - embedded(table, ids) @ own).square().mean(0) / len(tokens)
    own = own[: table.shape[1]] * (REFERENCE_STEP**2 / (left + REFERENCE_STEP**2)).sqrt()
    packed = _rounded_table(_token_vectors(tokens, table, own), tokens, budget)
    yield "token table", packed
    used = unpack(packed, "table")[packed["order"]]
    reach = min(REACH, used.shape[1])
    inputs = [torch.from_numpy(token_inputs(used[ids], reach, SKIPPED)).to(table.device) for ids in tokens]
    scale = torch.stack([rows.square().mean(0) for rows in inputs]).mean(0).sqrt().clamp_min(1e-6)
    inputs = [(rows / scale).to(torch.bfloat16) for rows in inputs]
    share = torch.ones_like(scale)
    share[:-PLACES] = (scale[:-PLACES] / scale[:-PLACES].max()) ** SHARE
    units = unpack(rounded_units := _units(inputs, coordinates, share, options, progress), "hidden")
    yield f"{units.shape[1]} units", {"scale": scale.cpu().numpy(), **rounded_units}
    yield "prediction", _weights(inputs, coordinates, share, torch.from_numpy(units).to(table.device))


def _token_vectors(tokens: NDArray[np.int32], table: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return a vector for every token id, ``[V, E]``, in principal axes of the prediction ``table @ own``.

    ``table`` ``[V, E]`` are the embeddings. ``own`` ``[E, R]`` are the weights of a token's own embedding. Its columns
    are already scaled by the harm of errors in them: coordinates well above the step cost bits, smaller ones their
    squared error.
    """
    counts = torch.bincount(torch.from_numpy(tokens.reshape(-1)).long(), minlength=len(table)).to(table.device).float()
    spread = (table.T * counts) @ table / counts.sum()
    values, turn = torch.linalg.eigh(spread.double())
    root = (turn * values.clamp_min(0).sqrt()) @ turn.T
    across = (own @ own.T).double()
    axes = torch.linalg.eigh(root @ across @ root).eigenvectors.flip(1)
    # own = left @ right, where right has orthonormal rows, so table @ left are coordinates; axes sort by importance.
    lengths, turns = torch.linalg.eigh(across)
    left = turns * lengths.clamp_min(1e-30).sqrt()
    spun = torch.linalg.qr(left.T @ root @ axes).Q
    vectors: torch.Tensor = (table.double() @ left @ spun).float()
    return vectors


def _rounded_table(own: torch.Tensor, tokens: NDArray[np.int32], budget: int) -> Arrays:
    """Round and pack the vectors ``own`` ``[V, E]`` within ``budget`` bytes, in groups of tokens of similar frequency.

    Vectors of rare tokens are rounded more coarsely.
    """
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
    rarity = (often.reshape(groups, size).mean(1) + UNSEEN) ** -RARITY
    widest = np.abs(rows).reshape(groups, size, -1).max(1)

    def rounded(wider: int) -> Arrays:
        base = TABLE_STEP * 1.25**wider
        step = np.maximum(base * (rarity / rarity.min())[:, None], widest / 127).astype(np.float32)
        return pack("table", rows, np.maximum(step, 1e-30))

    wider = bisect_left(range(TABLE_TRIES), True, key=lambda wider: rounded(wider)["table.codes"].size <= budget)
    return {"order": place, **rounded(wider)}


def _units(
    inputs: list[torch.Tensor],
    coordinates: list[torch.Tensor],
    share: torch.Tensor,
    options: PredictorOptions,
    progress: Progress | None,
) -> Arrays:
    """Train units and return their rounded weights ``[I, H]``, scaled so that outputs have the mean square 1."""
    device, size = inputs[0].device, inputs[0].shape[1]
    linear = Ridge()
    for rows, found in zip(inputs, coordinates, strict=True):
        linear.add(rows.float(), found.float())
    start = linear.solve(share)
    x = torch.cat(inputs)
    left = torch.cat([
        (found.float() - rows.float() @ start).to(torch.bfloat16)
        for rows, found in zip(inputs, coordinates, strict=True)
    ])  # fmt: skip
    power = torch.stack([rows.float().square().mean(0) for rows in torch.split(left, 4096)]).mean(0).clamp_min(1e-30)
    scale, harm = power.sqrt(), power / (power + REFERENCE_STEP**2)
    random = torch.Generator().manual_seed(0)
    units = (torch.randn(size, options.units, generator=random) / size**0.5).to(device).requires_grad_(True)
    out = torch.zeros(options.units, left.shape[1], device=device, requires_grad=True)
    descent = torch.optim.Adam([units, out], lr=RATE, betas=(0.9, 0.98))
    for step in range(options.steps):
        descent.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * (1 - step / options.steps)
        some = torch.randint(len(x), (min(BATCH, len(x)),), generator=random).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            guess = torch.relu((x[some].float() * share) @ units) @ out
        loss = ((left[some].float() / scale - guess.float()).square() * harm).mean()
        descent.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        descent.step()
        if progress:
            progress(step + 1, options.steps)
    found = units.detach() * share[:, None]
    energy = torch.stack([torch.relu(rows.float() @ found).square().mean(0) for rows in torch.split(x, 4096)]).mean(0)
    matrix = (found / energy.sqrt().clamp_min(1e-12)).cpu().numpy()
    noise = np.full((1, matrix.shape[1]), np.sqrt(24 * UNITS_NOISE / size), np.float32)
    return pack("hidden", matrix, np.maximum(noise, np.abs(matrix).max(0, keepdims=True) / 127))


def _weights(
    inputs: list[torch.Tensor], coordinates: list[torch.Tensor], share: torch.Tensor, units: torch.Tensor
) -> Arrays:
    """Return the rounded weights ``[I + H, R]`` of inputs and units; the step grows with the residual."""
    ridge, power, rows = Ridge(), torch.zeros(coordinates[0].shape[1], device=units.device), 0
    for one, found in zip(inputs, coordinates, strict=True):
        ridge.add(_features(one, units), found.float())
    weights = ridge.solve(torch.cat([share, torch.ones(units.shape[1], device=units.device)]))
    for one, found in zip(inputs, coordinates, strict=True):
        power += (found.float() - _features(one, units) @ weights).square().sum(0)
        rows += len(found)
    left = np.sqrt(np.maximum((power / rows).cpu().numpy(), REFERENCE_STEP**2))
    matrix = weights.cpu().numpy()
    step = np.sqrt(12 * WEIGHTS_NOISE / len(matrix)) * left
    return pack("weights", matrix, np.maximum(step, np.abs(matrix).max(0) / 127)[None].astype(np.float32))


def _features(inputs: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    rows = inputs.float()
    return torch.cat([rows, torch.relu(rows @ units)], dim=1)


def pack(name: str, matrix: Floats, step: Floats) -> Arrays:
    """Pack a matrix into the named arrays that :func:`unpack` reads."""
    return {f"{name}.{field}": array for field, array in pack_matrix(matrix, step, PRICE).items()}


def unpack(arrays: Arrays, name: str) -> Floats:
    """Return a packed matrix as a decoder will have it."""
    return unpack_matrix(Part("F32", (1, 0, 0), 0, 0, context=DecodeContext(arrays)), name)
