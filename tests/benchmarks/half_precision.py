"""What products in 16 bits cost ``fisher``: codes that change, squared error, harm to the decoded values.

    python tests/benchmarks/half_precision.py CAPTURE PROFILE LEVEL

Products are computed in float32, one after the other as in ``kvpack/gpu/kernels/token_klt``, from numbers that are
rounded to fp16, to bf16 or to TF32 (10 bits after the point), and compared with float64. Harm is squared error whitened
by the profile's Fisher information: the error that decompressing adds, relative to the codec's own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvpack.cache import windows
from kvpack.codecs.chain.packed import unpack_matrix
from kvpack.codecs.chain.transforms.token_klt.model import DECAYS, LAGS, PLACES, TokenModel, token_inputs
from kvpack.codecs.chain.transforms.unrope import rotate
from kvpack.codecs.context import DecodeContext, StackHints
from kvpack.codecs.recipes import fisher, fisher_log_step
from kvpack.formats.records import attention_mass, token_ids
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32
from kvpack.profiles import Profile

KINDS = ("float32", "half", "tf32", "bf16")


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounded to a kind, float32, near 1,024 at most meanwhile; as they are of the kind ``exact``."""
    if kind == "exact":
        return values
    if kind == "tf32":
        bits = values.float().contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    power = float(2.0 ** (10 - np.ceil(np.log2(max(float(values.abs().max()), 1e-30)))))
    return (values * power).to({"half": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)).float() / power


class Products:
    """A model's matrices in a kind; float64 in the kind ``exact``."""

    def __init__(self, model: TokenModel, kind: str) -> None:
        """Of ``model``."""
        self.kind, self.model = kind, model
        self.dtype = torch.float64 if kind == "exact" else torch.float32

    def of(self, a: Any, b: Any) -> torch.Tensor:
        """Both rounded."""
        a, b = (rounded(torch.as_tensor(x).to(self.dtype), self.kind) for x in (a, b))
        return a @ b

    def forward(self, x: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Centred rows and inputs to coordinates."""
        model, common = self.model, self.model.analysis.shape[1]
        both = self.told(inputs)
        first = self.of(x, model.analysis) - self.of(both, model.predictor.weights[:, :common])
        weights = torch.from_numpy(model.predictor.weights).to(self.dtype)
        cross = torch.from_numpy(model.local.cross).to(self.dtype)
        second = -self.of(both, weights[:, common:] + weights[:, :common] @ cross) - self.of(first, cross)
        half, at = x.shape[1] // 2, 0
        for (a, b), analysis in zip(model.local.bounds, model.local.analysis, strict=True):
            mine = torch.cat([x[:, a:b], x[:, half + a : half + b]], 1)
            second[:, at : at + analysis.shape[1]] += self.of(mine, analysis)
            at += analysis.shape[1]
        z = torch.cat([first, second], 1)
        z[: model.sinks] = 0
        return z

    def told(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs and units."""
        return torch.cat([inputs.to(self.dtype), self.of(inputs, self.model.predictor.hidden).clamp(min=0)], 1)

    def back(self, z: torch.Tensor) -> torch.Tensor:
        """Coordinates to rows."""
        model, common = self.model, self.model.analysis.shape[1]
        x = self.of(z[:, :common], model.synthesis)
        half, at = x.shape[1] // 2, common
        for (a, b), synthesis in zip(model.local.bounds, model.local.synthesis, strict=True):
            x = rounded(x, self.kind) if at == common and self.kind in ("half", "bf16") else x
            keys, values = self.of(z[:, at : at + len(synthesis)], synthesis).chunk(2, 1)
            x[:, a:b] += keys
            x[:, half + a : half + b] += values
            at += len(synthesis)
        return rounded(x, self.kind) if self.kind in ("half", "bf16") else x


def main(capture_path: str, profile_path: str, level: str) -> None:
    """Print both tables."""
    capture, profile = Capture.open(Path(capture_path)), Profile.open(Path(profile_path))
    codec = fisher(fisher_log_step(int(level)))
    context = DecodeContext(profile, token_ids(capture))
    window = next(windows(capture.spec, 2048))
    (order,) = codec.stacks(window)
    parts = window.take(order).parts
    part = codec.array_of(parts, context)
    x = to_float32(np.concatenate([capture.part(one) for one in parts]), "BF16")
    klt, quantizer = codec.keys.transforms[0], codec.keys.quantizer
    model, inner = klt.model(part), klt.output(part)
    rows, tokens, dims = part.shape
    keys = rotate(x[: rows // 2], model.frequencies, 0, -1)
    flat = np.concatenate([keys, x[rows // 2 :]]).transpose(1, 0, 2).reshape(tokens, -1) - model.mean[-1]
    told = model.predictor
    reach = (len(told.scale) - PLACES - told.table.shape[1]) // (LAGS + len(DECAYS))
    given = token_inputs(told.table[context.tokens[:tokens]], reach, 0) / told.scale
    elements, inputs, mean = map(torch.from_numpy, (flat, given, model.mean[-1]))
    exact = Products(model, "exact").forward(elements.double(), inputs.double()).float()
    levels, shifts, codes = quantizer.encode(exact.numpy()[None], inner, StackHints(attention_mass(capture)))

    def restored(*planes: Any) -> torch.Tensor:
        return torch.from_numpy(quantizer.decode([plane.copy() for plane in planes], inner)[0])

    own = (restored(levels, shifts, codes) - exact).square().sum()
    print("to coordinates: codes that differ, most apart, shifts that differ, squared error added")
    for kind in KINDS:
        z = Products(model, kind).forward(elements, inputs)
        planes = quantizer.encode(z.numpy()[None], inner)
        apart = np.abs(((planes[2].astype(int) + 1) >> 1) - ((codes.astype(int) + 1) >> 1)).max()
        error = float((restored(*planes) - exact).square().sum() / own - 1)
        moved = int((planes[1] != shifts).sum())
        print(f"  {kind:8} {np.mean(planes[2] != codes):.2e}  {apart}  {moved}  {error:+.1e}")
    whiten = torch.from_numpy(unpack_matrix(part, "fisher.whiten").reshape(rows, dims, dims))

    def harm(error: torch.Tensor) -> float:
        return float(torch.einsum("tbd,bde->tbe", error.float().reshape(tokens, rows, dims), whiten).square().sum())

    predicted = torch.from_numpy(model.predict(part))
    z = restored(levels, shifts, codes) + predicted
    back = Products(model, "exact").back(z.double())
    whole = harm(elements - back.float())
    print("from coordinates: harm added, over the codec's own, before and after bf16")
    for kind in KINDS:
        y = Products(model, kind).back(z)
        written = (y + mean).bfloat16().float() - mean
        print(f"  {kind:8} {harm(y - back) / whole:.1e}  {harm(written - back) / whole:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
