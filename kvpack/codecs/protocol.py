"""The interface of codecs: a codec turns the parts of a block into streams and back, and does not depend on files.

A window is the unit of storage, but it is too large as a unit of work. A codec therefore splits it into **blocks**:
runs of neighbouring parts that it codes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

from numpy.typing import NDArray

from kvpack.cache import PartSpec, TensorInfo, Window, WindowSpec
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.numerics.floats import Bits

Json = dict[str, Any]

NamedStream = tuple[str, Any]
"""The name of a stream's kind and its bytes."""

PartStreams = list[NamedStream]


class Scope(IntEnum):
    """What a codec codes as one array in a window: a tensor, the keys (or values) of all layers, or the cache."""

    TENSOR = 0
    KIND = 1
    CACHE = 2


class Need(Enum):
    """What a codec needs in order to work."""

    PROFILE = "profile"
    TOKENS = "tokens"
    MODEL = "model"


class Hint(Enum):
    """What an encoder benefits from but a decoder does not know. See :class:`kvpack.codecs.context.Hints`."""

    MASS = "mass"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Traits:
    """The properties of a codec that decide how its work is arranged.

    ``needs`` are things that a decoder requires or benefits from. ``hints`` are things that the encoder benefits from.
    ``alike`` says whether all layers must agree in shape and dtype. ``prefix_stable`` says whether, in this
    configuration and without hints, the frames of a prefix equal those of the whole cache.
    """

    scope: Scope
    needs: frozenset[Need]
    hints: frozenset[Hint]
    alike: bool
    prefix_stable: bool


class Codec(Protocol):
    """A codec with its settings. It is immutable, compared by value, and shared by threads."""

    @property
    def name(self) -> str:
        """Return the name that people see. Files carry the result of :meth:`to_json` instead."""

    @property
    def traits(self) -> Traits:
        """Return what the codec needs and how it splits windows."""

    @property
    def lossless(self) -> bool:
        """Return whether every bit of every part is restored."""

    @property
    def seeded(self) -> bool:
        """Return whether the codec uses random numbers."""

    def with_seed(self, seed: int) -> Codec:
        """Return the same codec with other random matrices. Seed 0 gives the codec's own matrices."""

    def with_step(self, log_step: int) -> Codec | None:
        """Return the same codec at a step of ``2 ** (log_step / 32)``, or None if it has no adjustable step."""

    def expected_bits(self, context: DecodeContext, tokens: int) -> tuple[str, float] | None:
        """Return a stream's name and its expected bits for ``tokens`` tokens like those of calibration, if known."""

    def to_json(self) -> Json:
        """Return the JSON form that a file carries."""

    def blocks(self, spec: WindowSpec) -> Iterator[slice]:
        """Yield the runs of the window's parts that are coded together, or stored losslessly together."""

    def takes(self, tensor: TensorInfo) -> bool:
        """Return whether the codec can be given this tensor. All codecs take keys and values. No other is decoded."""

    def exact(self, part: PartSpec) -> bool:
        """Return whether every bit of a part is restored."""

    def stream_names(self, block: WindowSpec, context: DecodeContext) -> set[str]:
        """Return the names of all streams that :meth:`encode` may give for a block.

        Raises:
            UnsupportedError: The block's parts cannot be coded together.

        """

    def encode(self, block: Window, context: DecodeContext, hints: Hints) -> list[PartStreams]:
        """Return the streams of each part.

        Raises:
            UnrepresentableError: The codec cannot represent some values.

        """

    def decode(self, block: WindowSpec, streams: Sequence[PartStreams], context: DecodeContext) -> list[Bits]:
        """Return the bit patterns ``[H, T, D]`` of each part, decoded from its streams.

        Raises:
            CorruptError: The streams do not decode to these parts.

        """


Profile = Mapping[str, NDArray[Any]]
