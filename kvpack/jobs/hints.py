"""Find a capture's hints for the encoder of a codec without a profile: RoPE's frequencies and the probes' weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvpack.cache.metadata import parse_metadata
from kvpack.codecs.chain.rotary import rotate
from kvpack.codecs.context import Hints
from kvpack.codecs.protocol import Codec, Hint
from kvpack.errors import FormatError
from kvpack.formats.records import attention_mass, layer_tensors, probe_positions, probe_queries
from kvpack.formats.source import Capture
from kvpack.numerics.floats import to_float32

Floats = NDArray[np.float32]


KEY_WEIGHT = 32**0.5
"""How an error of a logit counts relative to a relative error of a value, by trial on SmolLM2-135M (docs/fisher.md)."""


def encoder_hints(source: Capture, codec: Codec, *, open_ended: bool = False) -> Hints:
    """Return the hints that the encoder of ``codec`` benefits from, as far as the capture provides them.

    With ``open_ended`` only what the model alone determines is among them: RoPE's frequencies. Attention mass and
    probe queries come from tokens that follow.
    """
    wanted = codec.traits.hints
    if open_ended:
        return Hints(frequencies=rope_frequencies(source.metadata)) if Hint.WEIGHTS in wanted else Hints()
    mass = attention_mass(source) if Hint.MASS in wanted else None
    if Hint.WEIGHTS not in wanted:
        return Hints(mass)
    frequencies = rope_frequencies(source.metadata)
    return Hints(mass, frequencies, probe_weights(source, frequencies))


def rope_frequencies(metadata: Mapping[str, str]) -> Floats | None:
    """Return RoPE's frequencies ``[N]``, in radians a position, for dimensions i and i + N.

    They follow from the metadata ``rope`` and ``model``; without enough metadata the result is None. The kinds
    ``default``, ``linear`` and ``llama3`` of transformers are known.
    """
    known = parse_metadata(metadata)
    if known.rope is None or known.rotary_dimensions is None:
        return None
    try:
        with np.errstate(all="ignore"):
            found = _frequencies(known.rope, known.rotary_dimensions // 2)
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return None
    sound = found.size and np.isfinite(found).all() and (found > 1e-30).all() and (found <= 1).all()
    return found.astype(np.float32) if sound else None


def _frequencies(rope: Mapping[str, Any], count: int) -> NDArray[np.float64]:
    """Return the frequencies ``[count]`` as transformers' ``ROPE_INIT_FUNCTIONS`` does; raise for an unknown kind."""
    if not 0 < count <= 1 << 16:
        raise ValueError("not a number of dimensions")
    found = np.float64(rope["rope_theta"]) ** -(np.arange(count) / count)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        found /= float(rope["factor"])
    elif kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = found * float(rope["original_max_position_embeddings"]) / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        found *= smooth + (1 - smooth) / float(rope["factor"])
    elif kind != "default":
        raise ValueError("not a kind that is known")
    return found


def probe_weights(capture: Capture, frequencies: Floats | None) -> dict[str, Floats] | None:
    """Return the weights ``[H, D]`` of keys' and values' elements by tensor, computed from the probe queries.

    The result is None unless every layer has probe queries. An error of a key shifts a logit by scale * (q . error), so
    the weight of dimension d is the root mean square of q_d before RoPE. An error of a value matters relative to the
    standard deviation of its layer's values. It also matters relative to its layer's attention output, in proportion to
    how much the probes read the value. The weight is the geometric mean of both.
    """
    layers = layer_tensors(capture)
    keys: dict[str, Floats] = {}
    plain: dict[str, float] = {}
    read: dict[str, Floats] = {}
    scales = parse_metadata(capture.metadata)
    try:
        for layer, names in layers.items():
            found = _layer(capture, scales.attention_scale(layer), layer, names, frequencies)
            if found is None:
                return None
            keys[names["keys"]], plain[names["values"]], read[names["values"]] = found
    except FormatError:
        return None
    if not layers:
        return None
    level = np.mean([np.log(one) for one in plain.values()]) - np.mean([np.log(one).mean() for one in read.values()])
    values = {
        name: np.repeat(np.sqrt(plain[name] * one * np.exp(level))[:, None], capture.tensors[name].shape[2], axis=1)
        for name, one in read.items()
    }
    every = {name: np.asarray(one, np.float32) for name, one in {**keys, **values}.items()}
    return every if all(np.isfinite(one).all() and (one > 0).all() for one in every.values()) else None


def _layer(
    capture: Capture, scale: float | None, layer: int, names: Mapping[str, str], frequencies: Floats | None
) -> tuple[Floats, float, Floats] | None:
    """Return the keys' weights ``[H, D]``, 1 / the values' deviation, and how much the probes read values ``[H]``."""
    if len(names) < 2:
        return None
    keys, values = (to_float32(capture.read(names[k]), capture.tensors[names[k]].dtype) for k in ("keys", "values"))
    queries, positions = probe_queries(capture, layer), probe_positions(capture)
    heads, tokens, dims = keys.shape
    if queries is None or positions is None or not queries.size or not keys.size or values.shape[:2] != keys.shape[:2]:
        return None
    if queries.shape[0] % heads or queries.shape[1:] != (len(positions), dims):
        return None
    scale = float(dims**-0.5) if scale is None else scale
    grouped = queries.reshape(heads, -1, dims)
    visible = np.tile(np.arange(tokens) <= positions[:, None], (queries.shape[0] // heads, 1))
    energy, read = np.empty(heads), np.empty(heads)
    with np.errstate(all="ignore"):
        for head in range(heads):
            logits = np.where(visible, scale * (grouped[head] @ keys[head].T), -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            energy[head], read[head] = np.square(weights @ values[head]).sum(), np.square(weights).sum()
        deviation = np.sqrt(np.square(values - values.mean(1, keepdims=True)).mean())
        before = _before_rope(queries, positions, frequencies).reshape(heads, -1, dims)
        own = KEY_WEIGHT * scale * np.sqrt(np.square(before).mean(1) + 1e-12)
        return own, float(1 / deviation), np.sqrt(read / energy.sum())


def _before_rope(queries: Floats, positions: NDArray[np.integer[Any]], frequencies: Floats | None) -> Floats:
    """Return queries ``[H, P, D]`` as before RoPE. Each pair of dimensions that RoPE rotates gets its mean energy."""
    if frequencies is None or 2 * len(frequencies) > queries.shape[2]:
        return queries
    half = len(frequencies)
    each = [rotate(queries[:, i : i + 1], frequencies, int(at), -1) for i, at in enumerate(positions)]
    out = np.concatenate(each, axis=1)
    out[..., :half] = out[..., half : 2 * half] = np.hypot(out[..., :half], out[..., half : 2 * half]) / 2**0.5
    return out
