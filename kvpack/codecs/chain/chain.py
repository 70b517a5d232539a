"""A chain: the stages that an array passes through, in order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from kvpack.codecs.chain.base import EntropyCoder, Predictor, Quantizer, Stage, Transform
from kvpack.codecs.chain.keep import Keep
from kvpack.codecs.chain.registry import stage_from_json
from kvpack.errors import FormatError

S = TypeVar("S", bound=Stage)


@dataclass(frozen=True)
class Chain:
    """A chain's stages: tokens to keep whole, transforms in order, a predictor, a quantizer and an entropy coder."""

    keep: Keep | None
    transforms: tuple[Transform, ...]
    predictor: Predictor | None
    quantizer: Quantizer
    entropy: EntropyCoder

    @classmethod
    def of(cls, *stages: Stage) -> Self:
        """Return the chain of the given stages, in the order keep?, transforms, predictor?, quantizer, entropy coder.

        Raises:
            ValueError: Stages are missing, are in another order, or do not fit together.

        """
        rest = list(stages)
        keep = rest.pop(0) if rest and isinstance(rest[0], Keep) else None
        transforms = []
        while rest and isinstance(rest[0], Transform):
            transforms.append(rest.pop(0))
        predictor = rest.pop(0) if rest and isinstance(rest[0], Predictor) else None
        if len(rest) != 2 or not isinstance(rest[0], Quantizer) or not isinstance(rest[1], EntropyCoder):
            raise ValueError("a codec's stages stand in the wrong order")
        if rest[0].exact and len(stages) > 2:
            raise ValueError(f"{rest[0].name} codes bit patterns: nothing can stand before it")
        return cls(keep, tuple(transforms), predictor, rest[0], rest[1])  # type: ignore[arg-type]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Return the stages in order."""
        every = (self.keep, *self.transforms, self.predictor, self.quantizer, self.entropy)
        return tuple(stage for stage in every if stage is not None)

    def with_seed(self, seed: int) -> Self:
        """Return the same chain with ``1000 * seed`` added to every stage's seed."""
        return self.of(*(_reseeded(stage, seed) for stage in self.stages))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the stages' JSON forms in order."""
        return [stage.to_json() for stage in self.stages]

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Rebuild a chain from the result of :meth:`to_json`.

        Raises:
            FormatError: The document is not a chain.
            UnsupportedError: This kvpack does not have one of the stages.

        """
        if not isinstance(document, list) or not 2 <= len(document) <= 16:
            raise FormatError("a codec's chain is not a list of stages")
        try:
            return cls.of(*map(stage_from_json, document))
        except ValueError as error:
            raise FormatError(str(error)) from None


def _reseeded(stage: S, seed: int) -> S:
    changed: dict[str, Any] = {"seed": stage.seed + 1000 * seed} if hasattr(stage, "seed") else {}
    return replace(stage, **changed)
