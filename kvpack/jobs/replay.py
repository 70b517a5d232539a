"""Let the model compute a cache again: check that it is the right model, run it, and compare what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvpack.cache import CacheSpec, TensorInfo
from kvpack.cache.metadata import CaptureMetadata, Schedule, parse_metadata
from kvpack.codecs.model import Cache, LanguageModel, Replay
from kvpack.codecs.replay.sample import Sample
from kvpack.errors import MismatchError, UnsupportedError
from kvpack.formats.source import Capture
from kvpack.numerics.floats import TORCH_NAMES, to_float32

ATTENTION = "sdpa"
"""The only attention that can be replayed."""

WRONG_TOKEN = 0.01
"""The largest squared error of the first layer at a token, relative to its energy, that a machine may cause.

Keys and values of the first layer depend on their own token alone, by one matrix product. Rounding in bf16 leaves an
error of about 1e-5, and another token's one of about 1.
"""

WRONG_LAYER = 0.25
"""The same over all tokens, for any layer."""


class Identity(Protocol):
    """What :class:`kvpack.capture.model.Identity` says of a model."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def weights_sha256(self) -> str:
        """The SHA-256 of the weight files."""

    @property
    def config_sha256(self) -> str | None:
        """The SHA-256 of ``config.json``, or None for a GGUF file."""


def require_identity(metadata: CaptureMetadata, identity: Identity) -> None:
    """Check that a model is the one that made a cache, as far as its metadata say. This is done before anything runs.

    Raises:
        MismatchError: The model has other weights or another configuration.

    """
    for what, theirs, ours in (
        ("weights", metadata.weights_sha256, identity.weights_sha256),
        ("configuration", metadata.config_sha256, identity.config_sha256),
    ):
        if theirs is not None and theirs != ours:
            raise MismatchError(
                f"is of the model {metadata.model_name}, {what} {theirs[:12]}; "
                f"the model given is {identity.name}, {what} {(ours or 'none')[:12]}: give the right one with --model"
            )


def schedule_of(metadata: CaptureMetadata, spec: CacheSpec, tokens: NDArray[np.int32] | None) -> Schedule:
    """Return how the model must be run to compute a cache again.

    Raises:
        MismatchError: The cache does not say how it was computed, or it contradicts itself.
        UnsupportedError: It was computed with an attention that kvpack cannot run.

    """
    schedule = metadata.schedule
    if tokens is None or not len(tokens):
        raise MismatchError("has no token ids (a tensor `tokens`, I32 [T]), so no model can compute it again")
    if schedule is None:
        raise MismatchError("does not say how the model was run (metadata `schedule`), so it cannot be computed again")
    if metadata.implementation not in (None, ATTENTION):
        raise UnsupportedError(
            f"was computed with the attention {metadata.implementation!r}: kvpack runs {ATTENTION!r}"
        )
    rows = {tensor.rows for tensor in spec.layers}
    if rows != {len(tokens)} or schedule.tokens != len(tokens):
        raise MismatchError(
            f"has {len(tokens)} token ids, a schedule of {schedule.tokens} tokens, and keys and values of "
            f"{', '.join(map(str, sorted(rows)))} tokens: they must agree"
        )
    return schedule


def run(
    spec: CacheSpec,
    metadata: Mapping[str, str],
    tokens: NDArray[np.int32] | None,
    model: LanguageModel,
    *,
    sample: Sample | None = None,
    approximate: bool = False,
) -> tuple[Replay, Sample]:
    """Compute a cache again, and return it with a sample of its elements.

    ``sample`` is that of the machine that wrote the file. It is compared after the first forward pass.

    Raises:
        MismatchError: The cache cannot be computed again, or, unless ``approximate`` is set, this machine computes
            other elements than those of ``sample``.
        UnsupportedError: The cache was computed with an attention that kvpack cannot run.

    """
    schedule = schedule_of(parse_metadata(metadata), spec, tokens)
    assert tokens is not None
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.vocabulary:
        raise MismatchError(f"has token ids beyond the model's vocabulary of {model.vocabulary}")
    steps = list(schedule.steps())
    found: list[Sample] = []
    share = 0.0

    def first(cache: Cache) -> None:
        nonlocal share
        _require_shapes(spec.layers, cache, steps[0], model.dtype)
        found.append(Sample.of(cache, spec.layers, steps[0]))
        share = sample.differing(found[0]) if sample is not None else 0.0
        if share and not approximate:
            raise MismatchError(
                f"this machine computes the cache otherwise than the one that wrote the file ({share:.0%} of sampled "
                "elements differ): decompress it on such a machine, or take an approximation with --approximate"
            )

    cache = model.cache(tokens, steps, first)
    return Replay(cache, approximate=approximate, sampled=share), found[0]


def _require_shapes(tensors: Sequence[TensorInfo], cache: Cache, tokens: int, dtype: str) -> None:
    """Refuse a cache of another shape or dtype than the model's."""
    names = {tensor.name for tensor in tensors}
    if names != set(cache):
        raise MismatchError(f"has {len(names)} tensors of keys and values, the model computes {len(cache)}")
    for tensor in tensors:
        heads, _, dims = tensor.shape
        array = cache[tensor.name]
        if array.shape != (heads, tokens, dims) or TORCH_NAMES.get(tensor.dtype) != dtype:
            raise MismatchError(
                f"{tensor.name} has {heads} heads of {dims} elements of dtype {tensor.dtype}, "
                f"the model computes {array.shape[0]} of {array.shape[2]} in {dtype}"
            )


def require_same_text(capture: Capture, replay: Replay) -> None:
    """Check that the model computes about the same cache, which shows that tokens and model are those of the capture.

    A machine's rounding changes the last bits of many elements. Another token, other weights or an adapter change more.

    Raises:
        MismatchError: A token is not the one that its row was computed from, or a layer is not what the model computes.

    """
    lowest = min((tensor.layer for tensor in capture.spec.layers if tensor.layer is not None), default=0)
    for tensor in capture.spec.layers:
        bits, again = capture.read(tensor.name), replay.whole(tensor)
        if np.array_equal(bits, again):
            continue
        exact, computed = (to_float32(array, tensor.dtype).astype(np.float64) for array in (bits, again))
        with np.errstate(all="ignore"):
            error, energy = np.square(exact - computed).sum((0, 2)), np.square(exact).sum((0, 2))
            far = np.flatnonzero(~(error <= WRONG_TOKEN * energy))
        if tensor.layer == lowest and far.size:
            raise MismatchError(
                f"token {far[0]} is not the one that the cache was computed from ({tensor.name} differs there): "
                "its tokens, or the model, are not those of this cache"
            )
        if not error.sum() <= WRONG_LAYER * energy.sum():
            raise MismatchError(
                f"the model does not compute this cache from its tokens: {tensor.name} differs by "
                f"{error.sum() / max(energy.sum(), 1e-300):.0%} of its energy"
            )
