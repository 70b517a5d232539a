"""Reads and writes ``.kvprofile`` files, which hold what calibration learnt about a model.

``docs/profile-format.md`` specifies the format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvpack.cache.metadata import parse_metadata
from kvpack.errors import FormatError, MismatchError, UnsupportedError, naming
from kvpack.formats.input import InputFile
from kvpack.formats.kinds import begins, instead, is_safetensors
from kvpack.formats.safetensors import TensorFile, build_header

PROFILE_VERSION = 1
SECTIONS = ("fisher", "kvtc", "aquakv")
"""Families of codecs that need a profile; each is a section of it."""

_NUMPY = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _NUMPY.items()}


class Profile(Mapping[str, NDArray[Any]]):
    """An open profile: a mapping from names to arrays, where F16 arrays are read as float32.

    ``sha256`` is the digest of the whole file and identifies the profile.
    """

    def __init__(self, file: TensorFile, path: Path, sha256: str) -> None:
        """Wrap an open file that was read from ``path``.

        Raises:
            MismatchError: The file is not a profile, or this kvpack does not read its version.

        """
        if file.metadata.get("kvpack_profile_version") != str(PROFILE_VERSION):
            raise MismatchError("not a .kvprofile file of version 1")
        unsupported = next((spec.name for spec in file.tensors.values() if spec.dtype not in _NUMPY), None)
        if unsupported is not None:
            raise MismatchError(f"{unsupported}: a profile's tensors are F16, F32, I32 or U8")
        self.path, self.name, self.sha256 = path, path.name, sha256
        self.metadata = file.metadata
        self._file = file
        self._read: dict[str, NDArray[Any]] = {}

    @classmethod
    def open(cls, path: Path) -> Profile:
        """Open the profile ``path``; error messages start with the path.

        Raises:
            MismatchError: The file is not a profile, or it is damaged.

        """
        source = InputFile(path)
        with naming(str(path)), _malformed():
            if not is_safetensors(start := begins(source)):
                raise MismatchError(f"not a .kvprofile file{instead(start)}")
            return cls(TensorFile.of(source.name, source), path, source.sha256())

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._file.header.file_size

    @cached_property
    def model(self) -> dict[str, Any]:
        """Model that the profile was made for, as in a capture's metadata; empty if unknown."""
        return dict(parse_metadata(self.metadata).model)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return the array of this name; F16 arrays become float32.

        Raises:
            MismatchError: The file has become shorter since it was opened.

        """
        if name not in self._read:
            spec = self._file.tensors[name]
            with _malformed():
                array = np.frombuffer(self._file.data(spec), _NUMPY[spec.dtype]).reshape(spec.shape)
            aligned = array if array.flags.aligned else array.copy()  # a header of any length may precede the arrays
            self._read[name] = aligned.astype(np.float32) if spec.dtype == "F16" else aligned
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the arrays."""
        return iter(self._file.tensors)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._file.tensors)

    def identity(self) -> dict[str, str]:
        """Return the name and the digest that a ``.kvp`` file stores for the profile that it needs."""
        return {"name": self.name, "sha256": self.sha256}

    def require_model(self, metadata: Mapping[str, str]) -> None:
        """Check that the capture with this metadata comes from the profile's model.

        Raises:
            MismatchError: Both state the digest of the model's weights, and the digests differ.

        """
        mine, theirs = parse_metadata(self.metadata), parse_metadata(metadata)
        ours, other = mine.weights_sha256, theirs.weights_sha256
        if ours and other and ours != other:
            raise MismatchError(
                f"the profile {self.name} is for {mine.model_name} (weights {ours[:12]}), "
                f"the capture is of {theirs.model_name} (weights {other[:12]})"
            )


@contextmanager
def _malformed() -> Iterator[None]:
    """Turn what is wrong with a file into a mismatch: a malformed profile is a wrong profile, and has its exit code."""
    try:
        yield
    except (FormatError, UnsupportedError) as error:
        raise MismatchError(str(error)) from None


def write_profile(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any], output: BinaryIO) -> int:
    """Write arrays (float16, float32, int32 or uint8) and JSON metadata; return the size in bytes.

    The same arguments give the same bytes.
    """
    names = sorted(arrays)
    entries = [(name, _NAMES[arrays[name].dtype], arrays[name].shape) for name in names]
    text = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    header = build_header(entries, {"kvpack_profile_version": str(PROFILE_VERSION), **text})
    output.write(len(header.raw).to_bytes(8, "little") + header.raw)
    for name in names:
        output.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return header.file_size
