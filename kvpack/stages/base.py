"""What a stage is: a small frozen dataclass with a wire name, a version and a JSON form.

A wire name and version are a promise: two stages share them only if each decodes the other's bytes.
A **part** is what the pipeline codes at a time: one tensor over one range of tokens, ``[H, T, D]``.
A quantizer turns a part into **planes** of integer codes; an entropy coder turns each plane into a stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvpack.errors import FormatError

Codes = NDArray[np.unsignedinteger[Any]]
"""Integer codes of a plane, ``[H, T, D]``, any unsigned dtype."""

Floats = NDArray[np.float32]
"""Values of a part, ``[H, T, D]``."""


class UnrepresentableError(ValueError):
    """A lossy quantizer met values it cannot represent; the pipeline carries that part losslessly instead."""


@dataclass(frozen=True)
class Part:
    """One tensor over one token range.

    ``dtype`` is the safetensors spelling; ``shape`` is ``(H, T, D)``; ``first`` is the part's first token and
    ``total`` the tensor's number of tokens.
    """

    dtype: str
    shape: tuple[int, int, int]
    first: int
    total: int


@dataclass(frozen=True)
class PlaneSpec:
    """A plane's name, shape ``(H, T, D)``, bits a code, and whether an entropy model can pay for it."""

    name: str
    shape: tuple[int, int, int]
    width: int
    modelled: bool = True

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
    """Base of all stages; subclasses set ``name`` and ``version`` and add their configuration as fields."""

    name: ClassVar[str]
    version: ClassVar[int]

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
        for field in fields(cls):
            if type(configuration[field.name]).__name__ != field.type:
                raise FormatError(f"stage {cls.name!r}: field {field.name!r} is not of type {field.type}")
        try:
            return cls(**configuration)
        except ValueError as error:
            raise FormatError(f"stage {cls.name!r}: {error}") from None


class Transform(Stage):
    """Float to float, the same shape: ``[H, T, D]`` float32."""

    def forward(self, values: Floats) -> Floats:
        """Into the transformed domain."""
        raise NotImplementedError

    def inverse(self, values: Floats) -> Floats:
        """Back from it."""
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

    def encode(self, data: NDArray[Any], part: Part) -> list[Codes]:
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
