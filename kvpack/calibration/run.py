"""Computes the arrays and the metadata of a profile from a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from kvpack import __version__
from kvpack.calibration import aquakv, gradients, kvtc, prediction, scales, token_klt
from kvpack.calibration.corpus import SKIPPED, CorpusOptions, Sample
from kvpack.calibration.gradients import Network
from kvpack.calibration.prediction import PredictorOptions
from kvpack.calibration.work import Work
from kvpack.capture import Model
from kvpack.codecs.chain.base import Floats
from kvpack.codecs.chain.quantizers.higgs import FIRST_BITS, Higgs
from kvpack.codecs.recipes import AQUAKV_BITS, KVTC_RATES

Arrays = dict[str, NDArray[Any]]
Say = Callable[[str], None]

PLAIN_SHARE = 0.1
"""Weight of plain continuations in the gradients; repeated passages have the rest (ablation in docs/fisher.md)."""

RIVALS_TOKENS = 32768
CURVE_SEQUENCES = 6
"""Number of sequences held back on which the curve is measured, or the number of texts if there are more."""

EXPECTED_BYTES = 0.32
"""Expected size of each weight of the prediction in bytes."""

SCATTER_SEQUENCES = 12
"""Number of sequences held back on which scatter is measured, or the number of texts if there are more."""

BUDGET = 0.0495
"""Target size of the section ``fisher``, relative to the bytes of the model's weights in bf16."""


@dataclass(frozen=True)
class FisherOptions:
    """Options of the section ``fisher``.

    Attributes:
        rank: number of common coordinates per token.
        gradients: number of sequences whose gradients are computed.
        prediction: units and training steps of the prediction.

    """

    rank: int = 960
    gradients: int = 12
    prediction: PredictorOptions = field(default_factory=PredictorOptions)


def calibrate(
    model: Model,
    sample: Sample,
    sections: Sequence[str],
    options: FisherOptions,
    say: Say | None = None,
    work: Work | None = None,
) -> Arrays:
    """Return the profile's arrays for the codecs of ``sections``, as ``docs/profile-format.md`` specifies them.

    The same sample gives the same arrays on the same machine. Matrices are learnt on the model's device in float32 and
    rounded to fp16 or less.
    """
    tell = say or (lambda _: None)
    arrays: Arrays = {"rope.inv_freq": sample.frequencies}
    if "fisher" in sections:
        arrays |= _fisher(model, sample, options, tell, work or Work())
    if "kvtc" in sections:
        for kind in ("keys", "values"):
            tell(f"kvtc: principal components of {kind}")
            arrays |= _kvtc(sample.rows(kind, RIVALS_TOKENS), f"kvtc.{kind}", str(model.network.device))
    if "aquakv" in sections:
        arrays |= _aquakv(sample, tell)
    return arrays


def _fisher(model: Model, sample: Sample, options: FisherOptions, tell: Say, work: Work) -> Arrays:
    held, learnt = sample.held, sample.learnt
    network = Network(model, sample)
    chosen = _spread(learnt, options.gradients)
    tell(f"fisher: gradients of {len(chosen)} sequences")

    def measured() -> Arrays:
        information, sinks = gradients.fisher(network, sample, chosen, PLAIN_SHARE)
        return {"information": information.cpu().numpy(), "sinks": np.array(sinks)}

    found = work.once("gradients", measured)
    information, sinks = torch.from_numpy(found["information"]).to(network.device), int(found["sinks"])
    table = prediction.embeddings(model.network, sample, information.device)
    steps = token_klt.learn(sample, learnt, information, sinks, table, options.rank)
    parts = work.once("directions", lambda: _gathered(steps, tell))
    weights = sum(parameter.numel() for parameter in model.network.parameters())

    def predicted() -> Arrays:
        coordinates = token_klt.coordinates(sample, learnt, parts, information.device)
        units, columns = options.prediction.units, coordinates[0].shape[1]
        later = EXPECTED_BYTES * (units * 2048 + (units + 2048) * columns)
        budget = max(int(2 * weights * BUDGET - _bytes(parts) - later), 1 << 16)
        tokens = sample.tokens[learnt]
        return _gathered(prediction.learn(tokens, coordinates, table, budget, options.prediction), tell)

    parts |= work.once("prediction", predicted)
    arrays: Arrays = {"rope.inv_freq": sample.frequencies}
    arrays |= {f"fisher.{name}": array for name, array in parts.items()}
    texts = len(sample.documents)
    some = _spread(held, max(SCATTER_SEQUENCES, texts))
    tell(f"fisher: scatter on {len(some)} sequences held back")
    arrays |= {f"fisher.{name}": array for name, array in scales.scatter(sample, some, arrays).items()}
    rows = []
    for level, row in scales.curve(network, sample, _spread(held, max(CURVE_SEQUENCES, texts)), arrays):
        tell(f"fisher-{level}: KL {row[1]:.4f} plain, {row[4]:.4f} repeat")
        rows.append(row)
    return {**arrays, "fisher.curve": np.array(rows, np.float32)}


def _spread(sequences: list[int], most: int) -> list[int]:
    """Return at most ``most`` of the sequences, evenly spaced from the first to the last."""
    count = min(most, len(sequences))
    return [sequences[i] for i in np.linspace(0, len(sequences) - 1, count).round().astype(int)]


def _gathered(steps: Iterator[tuple[str, Arrays]], tell: Say) -> Arrays:
    parts: Arrays = {}
    for what, found in steps:
        tell(f"fisher: {what}, {_bytes(found):,} bytes")
        parts |= found
    return parts


def _bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _aquakv(sample: Sample, tell: Say) -> Arrays:
    tell("aquakv: grids")
    grids = {f"higgs.{4**bits}": aquakv.gaussian_grid(4**bits) for bits in sorted({*AQUAKV_BITS, FIRST_BITS})}
    arrays: Arrays = dict(grids)
    keys, values = (_by_layer(sample.rows(kind, aquakv.TRAINING_TOKENS), sample.layers) for kind in ("keys", "values"))
    for bits in AQUAKV_BITS:
        tell(f"aquakv: predictors at {bits} bits")
        found = aquakv.predictors(keys, values, Higgs(bits=bits, seed=3), grids, f"aquakv-{bits}")
        arrays |= {name: array.astype(np.float16) for name, array in found.items()}
    return arrays


def _kvtc(data: Floats, section: str, device: str) -> Arrays:
    principal = kvtc.principal_components(data, device)
    some = data[:: max(1, len(data) // kvtc.SAMPLE_TOKENS)]
    coefficients = np.asarray((some - principal.mean) @ principal.basis, np.float32)
    plans = kvtc.plans(coefficients, {rate: float(rate) for rate in KVTC_RATES})
    rank = max(int(plan[:, 0].sum()) for plan in plans.values())
    return {
        f"{section}.mean": principal.mean,
        f"{section}.basis": principal.basis[:, :rank].astype(np.float16),
        **{f"{section}.plan.{rate}": plan for rate, plan in plans.items()},
    }


def _by_layer(data: Floats, layers: int) -> Floats:
    """Rearrange ``[N, L * C]`` to ``[L, N, C]``."""
    return np.ascontiguousarray(data.reshape(len(data), layers, -1).transpose(1, 0, 2))


def metadata(model: Model, sample: Sample, options: CorpusOptions) -> dict[str, Any]:
    """Return the metadata of a profile: model, dtype, calibration and versions."""
    config = model.config
    return {
        "model": {
            "name": model.name,
            "architecture": type(model.network).__name__,
            "weights_sha256": model.weights_sha256,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
        },
        "dtype": model.dtype,
        "calibration": {
            "documents": sample.documents,
            "context": options.context,
            "skipped_first": SKIPPED,
            "tokens": sample.tokens.size,
        },
        "versions": {
            "kvpack": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
