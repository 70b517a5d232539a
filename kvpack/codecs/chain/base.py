"""Base classes of all stages, and the types that stages exchange.

A stage is a small frozen dataclass with a wire name (its name in the file), a version and a JSON form. Two stages
may share a wire name and version only if each decodes the bytes that the other wrote.

A **part** is what the pipeline codes at a time: one tensor over one range of tokens, or the keys (or the values) of
all layers stacked along the head axis. Its shape is ``[H, T, D]`` in both cases; transforms may change that shape.
A quantizer turns a part into **planes**, which are arrays of integer codes. An entropy coder turns each plane into
a stream of bytes.
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
from kvpack.numerics.floats import FLOAT_BITS

Codes = NDArray[np.unsignedinteger[Any]]
"""Integer codes of a plane, ``[H, T, D]``, of any unsigned dtype."""

Floats = NDArray[np.float32]
"""Values of a part, ``[H, T, D]``."""


class UnrepresentableError(ValueError):
    """A lossy quantizer met values that it cannot represent; the pipeline then stores that part losslessly."""


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

    def floats(self, name: str, *shape: int | None) -> Floats:
        """Return the profile's array of this name, float32 of this shape, where None stands for any length.

        This and the next two methods are the only way to a profile's arrays. Compiled code is given what they return.

        Raises:
            MismatchError: There is no profile, or its array is missing or is not of that kind and shape.

        """
        found = self._array(name)
        if found.dtype.kind != "f" or not _has_shape(found, shape):
            raise _unlike(name, found, "floats", shape)
        return np.ascontiguousarray(found, np.float32)

    def integers(self, name: str, *shape: int | None, least: int, most: int) -> NDArray[np.int32]:
        """Return the profile's array of this name, int32 of this shape, with values from ``least`` to ``most``.

        The errors are those of :meth:`floats`.
        """
        found = self._array(name)
        if found.dtype.kind not in "iu" or not _has_shape(found, shape):
            raise _unlike(name, found, "whole numbers", shape)
        if found.size and not least <= int(found.min()) <= int(found.max()) <= most:
            raise MismatchError(f"the profile's {name!r} has numbers beyond {least} to {most}: calibrate again")
        return np.ascontiguousarray(found, np.int32)

    def octets(self, name: str) -> NDArray[np.uint8]:
        """Return the profile's bytes of this name, uint8 ``[N]``. The errors are those of :meth:`floats`."""
        found = self._array(name)
        if found.dtype != np.uint8 or not _has_shape(found, (None,)):
            raise _unlike(name, found, "bytes", (None,))
        return np.ascontiguousarray(found)

    def _array(self, name: str) -> NDArray[Any]:
        profile = self.context.profile
        if profile is None:
            raise MismatchError("needs a calibration profile: give it with -D")
        if name not in profile:
            raise MismatchError(f"the profile has no {name!r}: calibrate again with the codec's section")
        return profile[name]


def _has_shape(array: NDArray[Any], shape: tuple[int | None, ...]) -> bool:
    return array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))


def _unlike(name: str, found: NDArray[Any], kind: str, shape: tuple[int | None, ...]) -> MismatchError:
    wanted = ", ".join("any" if length is None else str(length) for length in shape)
    return MismatchError(
        f"the profile's {name!r} is {found.dtype} {list(found.shape)}, not {kind} of shape [{wanted}]: it is not for "
        "this cache, or it is damaged"
    )


@dataclass(frozen=True)
class Scales:
    """Expected scale of each code of a plane ``[1, T, D]``, all in integers.

    The class of code (t, d) is ``(columns[d] - rows[t]) >> 3``, clipped to the row indices of ``tables``.

    Attributes:
        columns: scale of each column in 32nds of an octave, ``[D]``.
        rows: scale of each row in 32nds of an octave, ``[T]``.
        tables: for each class, the frequencies of the symbols of ``scaled_rans``, each at least 1, ``[K, A]``.

    """

    columns: NDArray[np.int32]
    rows: NDArray[np.int32]
    tables: NDArray[np.int32]

    def classes(self) -> NDArray[np.int32]:
        """Return the class of every code, ``[T, D]``."""
        found = (self.columns[None, :] - self.rows[:, None]) >> 3
        classes: NDArray[np.int32] = np.clip(found, 0, len(self.tables) - 1)
        return classes


@dataclass(frozen=True)
class PlaneSpec:
    """Description of a plane.

    Attributes:
        name: name of the plane, unique within its part.
        shape: ``(H, T, D)``.
        width: bits per code.
        modelled: whether an entropy model can save bits on this plane.
        scales: expected scales of the codes, or None.

    """

    name: str
    shape: tuple[int, int, int]
    width: int
    modelled: bool = True
    scales: Scales | None = field(default=None, compare=False, repr=False)

    @property
    def size(self) -> int:
        """Number of codes in the plane."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def code_dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Smallest unsigned dtype that holds ``width`` bits."""
        for dtype in (np.uint8, np.uint16, np.uint32):
            if self.width <= np.dtype(dtype).itemsize * 8:
                return np.dtype(dtype)
        return np.dtype(np.uint64)


@dataclass(frozen=True)
class Stage:
    """Base class of all stages; subclasses set ``name`` and ``version`` and add their configuration as fields.

    Attributes:
        name: wire name.
        version: wire version.
        profiled: the stage needs a calibration profile.
        stacked: the stage takes a stack of all layers.
        joint: the stage takes a stack of all layers' keys followed by all layers' values.
        adaptive: the stage learns what it needs from the stack itself. It takes one stack for each distinct layer
            shape, and its encoder is given the weights that the capture's probe queries yield.

    ``scope`` is what a stage must see as one array; ``needs`` are what it cannot work without;
    ``hints`` are what its encoder gains from.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    scope: ClassVar[Scope] = Scope.TENSOR
    needs: ClassVar[frozenset[Need]] = frozenset()
    hints: ClassVar[frozenset[Hint]] = frozenset()

    def require(self, part: Part) -> None:
        """Check that the stage can be given an array of this description.

        Raises:
            FormatError: It cannot.

        """

    @property
    def prefix_stable(self) -> bool:
        """Whether what it does to a row does not depend on how many rows follow."""
        return True

    def to_json(self) -> dict[str, Any]:
        """Return ``{"name", "version", "configuration"}``, with JSON types only."""
        configuration = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name, "version": self.version, "configuration": configuration}

    @classmethod
    def from_configuration(cls, configuration: dict[str, Any]) -> Self:
        """Build the stage from the configuration that a file holds as JSON.

        Raises:
            FormatError: A field is unknown, missing or invalid.

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
    """Base class of transforms: float32 ``[H, T, D]`` to float32 with the same T, where H and D may change."""

    def output(self, part: Part) -> Part:
        """Return the description of what :meth:`forward` returns: ``part``, unless the transform changes the shape."""
        return part

    def forward(self, values: Floats, part: Part) -> Floats:
        """Transform ``values``, which ``part`` describes."""
        raise NotImplementedError

    def inverse(self, values: Floats, part: Part) -> Floats:
        """Undo :meth:`forward`; ``part`` describes the result."""
        raise NotImplementedError


class Predictor(Stage):
    """Base class of predictors, which predict each row (first axis) from rows that are already decoded.

    Only the difference from the prediction is coded. After a predictor, the quantizer codes one row at a time, and
    the planes of all rows are concatenated along their first axis.
    """

    def predict(self, row: int, rows: Floats, reference: Floats | None, part: Part) -> Floats:
        """Return the prediction of row ``row``, ``[1, T, D]``.

        The rows before ``row`` of ``rows`` ``[H, T, D]`` are decoded already. ``reference`` is the decoded array of
        the keys when the values of a stack are predicted, and otherwise None.
        """
        raise NotImplementedError


class Quantizer(Stage):
    """Base class of quantizers, which turn a part into planes of integer codes and back.

    An ``exact`` quantizer takes and returns bit patterns (unsigned integers of the tensor's item size). All others
    take and return float32 values.
    """

    exact: ClassVar[bool]

    def takes(self, dtype: str) -> bool:
        """Return whether the quantizer can be given elements of this safetensors dtype."""
        return dtype in FLOAT_BITS

    def planes(self, part: Part) -> list[PlaneSpec]:
        """Return the planes of a part; they follow from its description alone, so the file need not store them."""
        raise NotImplementedError

    def scaled(self, plane: PlaneSpec, before: Mapping[str, Codes], part: Part) -> PlaneSpec:
        """Return the plane with its scales, where they follow from the codes of the planes ``before`` it."""
        return plane

    def encode(self, data: NDArray[Any], part: Part, hints: StackHints = NO_HINTS) -> list[Codes]:
        """Return one array of codes for each plane, in the order of :meth:`planes`.

        Raises:
            UnrepresentableError: The quantizer cannot represent some values (NaN, Inf or out of range).

        """
        raise NotImplementedError

    def decode(self, codes: list[Codes], part: Part) -> NDArray[Any]:
        """Undo :meth:`encode`; return bit patterns or float32 values, ``[H, T, D]``."""
        raise NotImplementedError


class EntropyCoder(Stage):
    """Base class of entropy coders, which turn one plane of integer codes into bytes and back, exactly."""

    def encode(self, codes: Codes, spec: PlaneSpec) -> bytes:
        """Return the bytes for ``codes`` of shape ``spec.shape``; every code is below ``2**spec.width``."""
        raise NotImplementedError

    def decode(self, data: memoryview, spec: PlaneSpec) -> Codes:
        """Return the codes that ``data`` holds, of shape ``spec.shape``.

        Raises:
            CorruptError: The bytes do not decode to such a plane.

        """
        raise NotImplementedError
