"""Finds profiles that are shipped with kvpack or installed by the user, so that ``-D`` need not be given.

The names of their files end with the start of their SHA-256, as in ``SmolLM2-135M-Instruct.0123456789ab.kvprofile``. A
profile that was shipped once stays, because files that were made with it need it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from kvpack.cache.metadata import parse_metadata
from kvpack.errors import KvpackError
from kvpack.formats.captures import layer_of
from kvpack.formats.output import atomic_output
from kvpack.formats.safetensors import TensorSpec
from kvpack.profiles.file import SECTIONS, Profile

SUFFIX = ".kvprofile"
DIGITS = 12
"""Number of hexadecimal digits of the SHA-256 in the name of an installed profile."""

SHIPPED = Path(__file__).parent / "shipped"


def installed_folder() -> Path:
    """Return the folder of the user's profiles.

    It is ``$KVPACK_PROFILES``, else ``$XDG_DATA_HOME/kvpack/profiles``, else ``~/.local/share/kvpack/profiles``.
    """
    own, shared = os.environ.get("KVPACK_PROFILES", ""), os.environ.get("XDG_DATA_HOME", "")
    if own:
        return Path(own)
    return (Path(shared) if shared else Path.home() / ".local" / "share") / "kvpack" / "profiles"


def installed_name(name: str, sha256: str) -> str:
    """Return the file name under which a profile called ``name`` with this digest is installed."""
    return f"{name.removesuffix(SUFFIX)}.{sha256[:DIGITS]}{SUFFIX}"


def install_profile(path: Path, model: str, *, move: bool) -> Path:
    """Copy or move the profile ``path`` of the model of this name to the folder of installed ones; return where it is.

    Raises:
        MismatchError: The file is not a profile, or it is damaged.
        OSError: It cannot be written there.

    """
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in model.removesuffix(".gguf")).strip(".") or "model"
    target = installed_folder() / installed_name(name[:200], Profile.open(path).sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    if move:
        path.replace(target)
    else:
        with path.open("rb") as source, atomic_output(target, force=True) as sink:
            shutil.copyfileobj(source, sink)
    return target


def profile_for(metadata: Mapping[str, str], codec: str, tensors: Iterable[TensorSpec]) -> Profile | None:
    """Return the newest installed profile, or else the shipped one, for the codec of this name and a capture's model.

    ``metadata`` and ``tensors`` are the capture's. Models are compared by the SHA-256 of their weights; a capture that
    names none gets no profile. A profile of ``fisher`` is passed over if it is for another number of elements per
    token, as where a capture has some layers only.
    """
    wanted = parse_metadata(metadata).weights_sha256
    if wanted is None:
        return None
    elements = sum(spec.shape[0] * spec.shape[2] for spec in tensors if layer_of(spec) is not None)
    return next((profile for profile in _profiles("") if _fits(profile, wanted, section_of(codec), elements)), None)


def _fits(profile: Profile, weights_sha256: str, section: str, elements: int) -> bool:
    if parse_metadata(profile.metadata).weights_sha256 != weights_sha256 or section not in sections_of(profile):
        return False
    return section != "fisher" or profile["fisher.mean"].shape[-1] == elements


def section_of(name: str) -> str:
    """Return the section of a profile to which a codec or an array of this name belongs."""
    return name.split(".", maxsplit=1)[0].split("-", maxsplit=1)[0]


def sections_of(profile: Iterable[str]) -> set[str]:
    """Return the sections, of :data:`SECTIONS`, that a profile with arrays of these names has."""
    return {section_of(name) for name in profile} & set(SECTIONS)


def profile_with(sha256: str) -> Profile | None:
    """Return the installed or shipped profile with this digest, or None."""
    return next((profile for profile in _profiles(sha256[:DIGITS]) if profile.sha256 == sha256), None)


def _profiles(digits: str) -> Iterator[Profile]:
    """Yield the profiles whose names end with these digits, the user's first and of those the newest first.

    A file that is no profile is passed over.
    """
    for place in (installed_folder(), SHIPPED):
        with suppress(OSError):
            states = [(path, path.stat()) for path in place.glob(f"*{digits}{SUFFIX}")]
            for path, state in sorted(states, key=lambda pair: -pair[1].st_mtime_ns):
                with suppress(OSError, KvpackError):
                    yield _open(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=4)
def _open(path: Path, _modified: int, _size: int) -> Profile:
    return Profile.open(path)
