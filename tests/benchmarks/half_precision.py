"""What coordinates in 16 bits cost ``fisher``: codes that change, squared error, harm of what comes back.

    python tests/benchmarks/half_precision.py CAPTURE PROFILE LEVEL

Products are taken in float32 of matrices rounded to halves, to bf16 or to TF32 (10 bits behind the point), and held
against float64. Harm is squared error whitened by the profile's Fisher information: of what decompressing adds, over
the codec's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from kvpack.archive import Capture, side_of
from kvpack.codecs import CODECS
from kvpack.container import plan_parts
from kvpack.floats import to_float32
from kvpack.profile import Profile
from kvpack.stages.packed import unpack_matrix
from kvpack.stages.transforms.token_klt.model import DECAYS, LAGS, PLACES, token_inputs
from kvpack.stages.transforms.unrope import rotate
from kvpack.tensorfile import TensorFile
from kvpack.units import Unit, units

KINDS = ("float32", "half", "tf32", "bf16")


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounded to a kind, float32."""
    if kind == "tf32":
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    return values.to({"half": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)).float()


def power(values: torch.Tensor) -> float:
    """The power of two that brings the largest entry near 1,024, as ``token_klt/cuda.py`` does."""
    return float(2.0 ** (10 - np.ceil(np.log2(float(values.abs().max())))))


def main(capture_path: str, profile_path: str, level: str) -> None:
    """Print both tables."""
    capture, profile = Capture(TensorFile.open(Path(capture_path))), Profile.open(Path(profile_path))
    codec, side = CODECS[f"fisher-{level}"], side_of(capture, {"tokens", "attention_mass"})
    group = next(g for g in units(plan_parts(capture.file.header, 2048), True) if len(g) > 1)
    stack, part = Unit(group, codec, profile, side).joint_stack()
    x = to_float32(np.concatenate([capture.read_part(plan) for plan in stack]), "BF16")
    klt, quantizer = codec.keys.transforms[0], codec.keys.quantizer
    model, inner = klt.model(part), klt.output(part)
    rows, tokens, dims = part.shape
    keys = rotate(x[: rows // 2], model.frequencies, 0, -1)
    flat = np.concatenate([keys, x[rows // 2 :]]).transpose(1, 0, 2).reshape(tokens, -1) - model.mean[-1]
    reach = (len(model.weights) - PLACES - model.table.shape[1]) // (LAGS + len(DECAYS))
    given = token_inputs(model.table[side.tokens[:tokens]], reach, 0)
    elements, inputs, analysis, synthesis, weights, mean = map(
        torch.from_numpy, (flat, given, model.analysis, model.synthesis, model.weights, model.mean[-1])
    )
    exact = (elements.double() @ analysis.double() - inputs.double() @ weights.double()).float()
    exact[: model.sinks] = 0
    levels, codes = quantizer.encode(exact.numpy()[None], inner)
    restored = lambda c: torch.from_numpy(quantizer.decode([levels.copy(), c.copy()], inner)[0])  # noqa: E731
    own = (restored(codes) - exact).square().sum()
    print("to coordinates: codes that differ, most apart, squared error added")
    for kind in KINDS:
        scale = power(analysis)
        z = (
            rounded(elements, kind) @ rounded(analysis * scale, kind)
            - rounded(inputs / 16, kind) @ rounded(weights * scale, kind) * 16
        )
        z /= scale
        z[: model.sinks] = 0
        got = quantizer.encode(z.numpy()[None], inner)[1]
        apart = np.abs(((got.astype(int) + 1) >> 1) - ((codes.astype(int) + 1) >> 1)).max()
        error = float((restored(got) - exact).square().sum() / own - 1)
        print(f"  {kind:8} {np.mean(got != codes):.2e}  {apart}  {error:+.1e}")
    whiten = torch.from_numpy(unpack_matrix(part, "fisher.whiten").reshape(rows, dims, dims))

    def harm(error: torch.Tensor) -> float:
        return float(torch.einsum("tbd,bde->tbe", error.float().reshape(tokens, rows, dims), whiten).square().sum())

    predicted = inputs @ weights
    predicted[: model.sinks] = 0
    z = restored(codes) + predicted
    back = z.double() @ synthesis.double()
    whole = harm(elements - back.float())
    print("from coordinates: harm added, over the codec's own, before and after bf16")
    for kind in KINDS:
        scale = power(synthesis)
        y = (rounded(z * 16, kind) @ rounded(synthesis * scale, kind)) / scale / 16
        y = rounded(y, kind) if kind in ("half", "bf16") else y
        written = (y + mean).bfloat16().float() - mean
        print(f"  {kind:8} {harm(y - back) / whole:.1e}  {harm(written - back) / whole:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
