"""From a sample to a profile's arrays and metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import kvpack
from kvpack.calibration import aquakv, kvtc
from kvpack.calibration.corpus import SKIPPED, CorpusOptions, Sample
from kvpack.capture import Model
from kvpack.codecs import AQUAKV_BITS, KVTC_RATES
from kvpack.stages.base import Floats
from kvpack.stages.quantizers.higgs import FIRST_BITS, Higgs

Arrays = dict[str, NDArray[Any]]
Say = Callable[[str], None]


def calibrate(sample: Sample, device: str = "cpu", say: Say | None = None) -> Arrays:
    """The arrays of ``docs/profile-format.md``: deterministic for one sample on one machine.

    Matrices are learnt on ``device`` in float32, and rounded to fp16 but for what is small.
    """
    arrays: Arrays = {"rope.inv_freq": sample.frequencies}
    tell = say or (lambda _: None)
    for kind, data in (("keys", sample.keys), ("values", sample.values)):
        tell(f"kvtc: principal components of {kind}")
        arrays |= _kvtc(data, f"kvtc.{kind}", device)
    tell("aquakv: grids")
    grids = {f"higgs.{4**bits}": aquakv.gaussian_grid(4**bits) for bits in sorted({*AQUAKV_BITS, FIRST_BITS})}
    arrays |= grids
    keys, values = (_by_layer(data, sample.layers) for data in (sample.keys, sample.values))
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
    """``[N, L * C]`` to ``[L, N', C]``, tokens taken evenly."""
    some = data[:: -(-len(data) // aquakv.TRAINING_TOKENS)]
    return np.ascontiguousarray(some.reshape(len(some), layers, -1).transpose(1, 0, 2))


def metadata(model: Model, sample: Sample, options: CorpusOptions) -> dict[str, Any]:
    """What a profile says about itself."""
    config = model.config
    return {
        "model": {
            "name": model.name,
            "architecture": type(model.network).__name__,
            "weights_sha256": model.weights_sha256,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
        },
        "dtype": str(model.network.dtype).removeprefix("torch."),
        "calibration": {
            "documents": sample.documents,
            "context": options.context,
            "skipped_first": SKIPPED,
            "tokens": len(sample.keys),
        },
        "versions": {
            "kvpack": kvpack.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
