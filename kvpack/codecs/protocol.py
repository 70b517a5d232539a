"""What a codec is: it turns the parts of a block into streams and back, and knows of no file.

A window is the unit of storage, which is too coarse for work: a codec splits it into **blocks**, the runs of
neighbouring parts that it codes together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Protocol

from numpy.typing import NDArray

from kvpack.cache import PartSpec, Window, WindowSpec
from kvpack.codecs.context import DecodeContext, Hints
from kvpack.numerics.floats import Bits

Json = dict[str, Any]

NamedStream = tuple[str, Any]
"""The name of a stream's kind and its bytes."""

PartStreams = list[NamedStream]


class Scope(IntEnum):
    """What a codec codes as one array within a window: a tensor, the keys (or values) of all layers, or the cache."""

    TENSOR = 0
    KIND = 1
    CACHE = 2


class Need(Enum):
    """What a codec cannot do without."""

    PROFILE = "profile"
    TOKENS = "tokens"


class Hint(Enum):
    """What an encoder gains from, beside what the decoder knows: see :class:`kvpack.codecs.context.Hints`."""

    MASS = "mass"
    WEIGHTS = "weights"


@dataclass(frozen=True)
class Traits:
    """What those who arrange a codec's work must know of it.

    ``needs`` are things a decoder must be given, or gains from. ``hints`` are what the encoder gains from.
    ``alike`` says whether all layers must agree in shape and dtype. ``prefix_stable`` says whether, in
    this configuration and without hints, the frames of a prefix are those of the whole cache.
    """

    scope: Scope
    needs: frozenset[Need]
    hints: frozenset[Hint]
    alike: bool
    prefix_stable: bool


class Codec(Protocol):
    """A codec with its settings; immutable, compared by value, shared by threads."""

    @property
    def name(self) -> str:
        """For people; files carry :meth:`to_json`."""

    @property
    def traits(self) -> Traits:
        """What it needs and how it splits windows."""

    @property
    def lossless(self) -> bool:
        """Whether every bit of every part comes back."""

    @property
    def seeded(self) -> bool:
        """Whether something in it is random."""

    def with_seed(self, seed: int) -> Codec:
        """The same with other random matrices; 0 gives the codec's own."""

    def with_step(self, log_step: int) -> Codec | None:
        """The same at a step of ``2 ** (log_step / 32)``, or None where it has no step to choose."""

    def expected_bits(self, context: DecodeContext, tokens: int) -> tuple[str, float] | None:
        """A stream's name and how many bits it should take for ``tokens`` like those of the calibration, if known."""

    def to_json(self) -> Json:
        """The form that a file carries."""

    def blocks(self, spec: WindowSpec) -> Iterator[slice]:
        """Runs of the window's parts that are coded, or carried losslessly, together."""

    def exact(self, part: PartSpec) -> bool:
        """Whether every bit of a part comes back."""

    def stream_names(self, block: WindowSpec, context: DecodeContext) -> set[str]:
        """Names of all streams that :meth:`encode` may give for a block.

        Raises:
            UnsupportedError: the block's parts cannot be coded together.

        """

    def encode(self, block: Window, context: DecodeContext, hints: Hints) -> list[PartStreams]:
        """The streams of each part.

        Raises:
            UnrepresentableError: values that the codec cannot represent.

        """

    def decode(self, block: WindowSpec, streams: Sequence[PartStreams], context: DecodeContext) -> list[Bits]:
        """The bit patterns ``[H, T, D]`` of each part, from the streams of each.

        Raises:
            CorruptError: the streams do not decode to these parts.

        """


Profile = Mapping[str, NDArray[Any]]
