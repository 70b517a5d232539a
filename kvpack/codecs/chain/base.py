"""What a stage is: a small frozen dataclass with a wire name, a version and a JSON form.

A wire name and version are a promise: two stages share them only if each decodes the other's bytes.
A **part** is what the pipeline codes at a time: one tensor over one range of tokens, or the keys (or the values)
of all layers stacked along heads; ``[H, T, D]`` either way. Transforms may give it another shape. A quantizer
turns it into **planes** of integer codes; an entropy coder turns each plane into a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvpack.codecs.context import NO_HINTS, DecodeContext, StackHints
from kvpack.codecs.protocol import Hint, Need, Scope
from kvpack.errors import FormatError, MismatchError

Codes = NDArray[np.unsignedinteger[Any]]
"""Integer codes of a plane, ``[H, T, D]``, any unsigned dtype."""

Floats = NDArray[np.float32]
"""Values of a part, ``[H, T, D]``."""


class UnrepresentableError(ValueError):
    """A lossy quantizer met values it cannot represent; the pipeline carries that part losslessly instead."""


@dataclass(frozen=True)
class Part:
    """One array that is coded: a tensor over a range of tokens, or a stack of the tensors of all layers.

    ``dtype`` is the safetensors spelling. ``shape`` is ``(H, T, D)``. ``first`` is the first row in its tensor, and
    ``length`` the tensor's number of rows, or None while more may follow; ``origin`` is the position of the tensor's
    first row in the text. In a stack ``heads`` is the number of heads a layer, so that layer i is rows
    ``i * heads ..``; of one tensor it is H. The first ``keys`` rows are keys. ``row`` is the part's first row where a
    predictor codes row by row. ``context`` is what the decoder knows too.
    """

    dtype: str
    shape: tuple[int, int, int]
    first: int
    length: int | None
    heads: int = 0
    row: int = 0
    keys: int = 0
    origin: int = 0
    context: DecodeContext = field(default=DecodeContext(), compare=False, repr=False)

    @property
    def position(self) -> int:
        """The position of the first row in the text."""
        return self.origin + self.first

    def array(self, name: str) -> NDArray[Any]:
        """An array of the profile.

        Raises:
            MismatchError: no profile, or it has no such array.

        """
        profile = self.context.profile
        if profile is None:
            raise MismatchError("needs a calibration profile: give it with -D")
        if name not in profile:
            raise MismatchError(f"the profile has no {name!r}: calibrate again with the codec's section")
        return profile[name]


@dataclass(frozen=True)
class Scales:
    """How widely each code of a plane ``[1, T, D]`` is expected to scatter, all integers.

    Code (t, d) is of class ``(columns[d] - rows[t]) >> 3``, clipped to the rows of ``tables`` ``[K, A]``: frequencies
    of the symbols of ``scaled_rans``, each at least 1. ``columns`` and ``rows`` are 32nds of an octave.
    """

    columns: NDArray[np.int32]
    rows: NDArray[np.int32]
    tables: NDArray[np.int32]

    def classes(self) -> NDArray[np.int32]:
        """The class of every code, ``[T, D]``."""
        found = (self.columns[None, :] - self.rows[:, None]) >> 3
        classes: NDArray[np.int32] = np.clip(found, 0, len(self.tables) - 1)
        return classes


@dataclass(frozen=True)
class PlaneSpec:
    """A plane's name, shape ``(H, T, D)``, bits a code, whether an entropy model can pay for it, and its scales."""

    name: str
    shape: tuple[int, int, int]
    width: int
    modelled: bool = True
    scales: Scales | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def code_dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The smallest unsigned dtype that holds ``width`` bits."""
        for dtype in (np.uint8, np.uint16, np.uint32):
            if self.width <= np.dtype(dtype).itemsize * 8:
                return np.dtype(dtype)
        return np.dtype(np.uint64)


@dataclass(frozen=True)
class Stage:
    """Base of all stages; subclasses set ``name`` and ``version`` and add their configuration as fields.

    ``scope`` is what a stage must see as one array; ``needs`` are what it cannot work without;
    ``hints`` are what its encoder gains from.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    scope: ClassVar[Scope] = Scope.TENSOR
    needs: ClassVar[frozenset[Need]] = frozenset()
    hints: ClassVar[frozenset[Hint]] = frozenset()

    @property
    def prefix_stable(self) -> bool:
        """Whether what it does to a row does not depend on how many rows follow."""
        return True

    def to_json(self) -> dict[str, Any]:
        """``{"name", "version", "configuration"}``, JSON types only."""
        configuration = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name, "version": self.version, "configuration": configuration}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """Rebuild from a file's JSON.

        Raises:
            FormatError: unknown, missing or invalid configuration.

        """
        if set(configuration) != {f.name for f in fields(cls)}:
            raise FormatError(f"stage {cls.name!r}: configuration has the fields {sorted(configuration)}")
        for f in fields(cls):
            if type(configuration[f.name]).__name__ != f.type:
                raise FormatError(f"stage {cls.name!r}: field {f.name!r} is not of type {f.type}")
        try:
            return cls(**configuration)
        except ValueError as error:
            raise FormatError(f"stage {cls.name!r}: {error}") from None


class Transform(Stage):
    """Float to float: ``[H, T, D]`` float32 to an array of the same tokens, T, and maybe other H and D."""

    def output(self, part: Part) -> Part:
        """The part that :meth:`forward` gives: the same, unless it changes the shape."""
        return part

    def forward(self, values: Floats, part: Part) -> Floats:
        """Into the transformed domain; ``part`` describes ``values``."""
        raise NotImplementedError

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Back from it; ``part`` describes what comes out."""
        raise NotImplementedError


class Predictor(Stage):
    """Says what each row (first axis) is expected to be, from rows already decoded; only the rest is coded.

    Behind a predictor, the quantizer codes one row at a time and its planes are joined along their first axis.
    """

    def predict(self, row: int, rows: Floats, reference: Floats | None, part: Part) -> Floats:
        """The expected row ``[1, T, D]``.

        ``rows`` ``[H, T, D]`` are decoded before ``row``; ``reference`` is the keys' decoded array, where the
        values of a stack are predicted.
        """
        raise NotImplementedError


class Quantizer(Stage):
    """A part to planes of integer codes and back.

    An ``exact`` quantizer is given and gives bit patterns (unsigned integers of the tensor's item size); the
    others float32 values.
    """

    exact: ClassVar[bool]

    def planes(self, part: Part) -> list[PlaneSpec]:
        """The planes of a part: a function of the part's description alone, so that nothing is stored."""
        raise NotImplementedError

    def scaled(self, plane: PlaneSpec, before: Mapping[str, Codes], part: Part) -> PlaneSpec:
        """The plane with its scales, where its entropy model follows from planes ``before`` it."""
        return plane

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """One array a plane, in the order of :meth:`planes`.

        Raises:
            UnrepresentableError: values this quantizer cannot represent (NaN, Inf, out of range).

        """
        raise NotImplementedError

    def decode(self, codes: list[Codes], part: Part) -> NDArray[Any]:
        """The inverse: bit patterns or float32 values ``[H, T, D]``."""
        raise NotImplementedError


class EntropyCoder(Stage):
    """One plane of integer codes to bytes and back, exactly."""

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Bytes for ``codes`` of shape ``spec.shape``, every code below ``2**spec.width``."""
        raise NotImplementedError

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """The codes again, ``spec.shape``.

        Raises:
            CorruptError: the bytes do not decode to such a plane.

        """
        raise NotImplementedError
