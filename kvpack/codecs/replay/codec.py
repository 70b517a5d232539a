"""The codec ``replay``: a model computes the cache again, and the file holds the tokens and what the model misses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from kvpack.cache import PartSpec, TensorInfo, Window, WindowSpec
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.codecs.protocol import Need, PartStreams, Scope, Traits
from kvpack.codecs.replay import residual, tokens
from kvpack.codecs.replay.sample import Sample
from kvpack.errors import FormatError, MismatchError
from kvpack.kvp.header import FAST_TOKENS, REPLAY
from kvpack.numerics.floats import Bits

T = TypeVar("T")

NAME, VERSION = REPLAY, 1
TOKENS = "tokens"
"""The name of the tensor of token ids, and of its stream."""

PREDICTED = 1 << 10
"""The number of tokens in a chunk of the token stream if the model codes them."""


@dataclass(frozen=True)
class ReplayCodec:
    """Codes keys and values as their residual against the model's own computation, and token ids by themselves.

    ``sample`` are some elements of what the writer's machine computed, so that a reader's machine finds out early
    whether it computes the same; it is None until :meth:`with_sample`. ``token_chunk`` is the number of tokens in a
    chunk of the token stream, which the model codes if it is less than ``FAST_TOKENS``.
    """

    sample: Sample | None = None
    token_chunk: int = FAST_TOKENS

    name: ClassVar[str] = NAME
    lossless: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    traits: ClassVar[Traits] = Traits(
        scope=Scope.TENSOR,
        needs=frozenset({Need.TOKENS, Need.MODEL}),
        hints=frozenset(),
        alike=False,
        prefix_stable=False,
    )

    def with_sample(self, sample: Sample) -> Self:
        """Return the codec for a cache of which these elements are known."""
        return replace(self, sample=sample)

    def with_token_coder(self, coder: str) -> Self:
        """Return the codec with another way to code tokens: ``fast`` or ``model``."""
        return replace(self, token_chunk=PREDICTED if coder == "model" else FAST_TOKENS)

    def with_seed(self, seed: int) -> Self:
        """Return the codec itself: nothing in it is random."""
        return self

    def with_step(self, log_step: int) -> None:
        """Return None: the codec has no step."""

    def expected_bits(self, context: DecodeContext, tokens: int) -> None:
        """Return None: nothing is known in advance."""

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that a file carries."""
        assert self.sample is not None
        configuration = {"sample": self.sample.to_hex(), "token_chunk": self.token_chunk}
        return {"name": NAME, "version": VERSION, "configuration": configuration}

    @classmethod
    def from_json(cls, configuration: Any) -> Self:
        """Build the codec from the configuration that a file holds.

        Raises:
            FormatError: The configuration is not as ``docs/format.md`` says.

        """
        if not isinstance(configuration, dict) or set(configuration) != {"sample", "token_chunk"}:
            raise FormatError("replay: the configuration is not {sample, token_chunk}")
        sample, chunk = configuration["sample"], configuration["token_chunk"]
        if type(chunk) is not int or not 1 <= chunk <= FAST_TOKENS:
            raise FormatError(f"replay: token_chunk is not a number from 1 to {FAST_TOKENS}")
        return cls(Sample.from_hex(sample), chunk)

    def blocks(self, spec: WindowSpec) -> Iterator[slice]:
        """Yield a block for each part."""
        yield from (slice(i, i + 1) for i in range(len(spec.parts)))

    def takes(self, tensor: TensorInfo) -> bool:
        """Return whether the codec can be given this tensor: keys, values and token ids."""
        return tensor.layer is not None or _is_tokens(tensor)

    def exact(self, part: PartSpec) -> bool:
        """Return True: every bit comes back, if the model runs as it did when the file was written."""
        return self.takes(part.tensor)

    def stream_names(self, block: WindowSpec, context: DecodeContext) -> set[str]:
        """Return the names of the streams that a block may have."""
        return {residual.SYMBOLS, residual.RAW} if block.layered else {TOKENS}

    def encode(self, block: Window, context: DecodeContext, hints: Hints) -> list[PartStreams]:
        """Return the streams of each part. Keys and values that the model computes bit for bit have none."""
        if block.spec.layered:
            return [
                self._encode(part, bits, context) for part, bits in zip(block.spec.parts, block.arrays, strict=True)
            ]
        ids = np.ascontiguousarray(block.arrays[0]).reshape(-1).view(np.int32)
        model = _required(context.model) if self.token_chunk < FAST_TOKENS else None
        steps, vocabulary = (model.steps(len(ids)), model.vocabulary) if model is not None else (None, 0)
        return [[(TOKENS, tokens.encode(ids, self.token_chunk, steps, vocabulary))]]

    def _encode(self, part: PartSpec, bits: Bits, context: DecodeContext) -> PartStreams:
        expected = _required(context.replay).part(part)
        return list(residual.encode(residual.residual(np.ascontiguousarray(bits), expected)))

    def decode(self, block: WindowSpec, streams: Sequence[PartStreams], context: DecodeContext) -> list[Bits]:
        """Return the bit patterns of each part: the inverse of :meth:`encode`.

        Raises:
            CorruptError: The streams do not decode to these parts.
            MismatchError: There is no model, or it does not fit the file.

        """
        if block.layered:
            return [self._decode(part, mine, context) for part, mine in zip(block.parts, streams, strict=True)]
        part, found = block.parts[0], dict(streams[0])
        if set(found) != {TOKENS} or not _is_tokens(part.tensor):
            raise FormatError(f"{part.label}: is not coded as token ids are")
        ids = context.tokens  # known if keys and values were decoded before, because they need them too
        if ids is None:
            ids = tokens.decode(memoryview(found[TOKENS]), part.tokens, self.token_chunk, context.model)
        return [ids.view("<u4").reshape(part.shape)]

    def _decode(self, part: PartSpec, streams: PartStreams, context: DecodeContext) -> Bits:
        expected = _required(context.replay).part(part)
        found = {name: memoryview(data) for name, data in streams}
        if len(found) != len(streams):
            raise FormatError(f"{part.label}: has a stream twice")
        return residual.restore(residual.decode(found, part.shape, part.tensor.itemsize), expected)


def _is_tokens(tensor: TensorInfo) -> bool:
    heads, rows, dims = tensor.shape
    return tensor.name == TOKENS and tensor.dtype == "I32" and heads == dims == 1 and rows > 0


def _required(found: T | None) -> T:
    if found is None:
        raise MismatchError("needs the model that made the cache: give it with --model")
    return found
