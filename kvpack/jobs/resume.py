"""Find out whether an output that is there already is what the work would give, so that it can be skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvpack.codecs.protocol import Codec
from kvpack.codecs.replay import ReplayCodec
from kvpack.engine import Engine
from kvpack.errors import KvpackError
from kvpack.formats.source import Capture
from kvpack.jobs.compression import chunk_of, without
from kvpack.jobs.decompression import Selection, differing_parts
from kvpack.jobs.reader import KvpFile
from kvpack.jobs.restoring import require_restorable
from kvpack.profiles import Profile


def require_compressed(
    target: Path,
    source: Capture,
    codec: Codec,
    *,
    profile: Profile | None = None,
    chunk_tokens: int | None = None,
    drop: Sequence[str] = (),
) -> KvpFile:
    """Return the ``.kvp`` file ``target`` if it was made from ``source`` in the way of the other arguments.

    Its digests must be those of the source, its streams must have their checksums, and codec, profile, chunk size and
    tensors left out must be those asked for. Nothing is encoded or decoded. Which version of kvpack wrote it does not
    matter. The arguments are those of :func:`kvpack.jobs.compress`.

    Raises:
        KvpackError: It is another file; the message says how it differs.

    """
    found = KvpFile.open(target, profile)
    header, kept = found.container.header, without(source.file.header, drop)
    wanted: Codec = codec
    if isinstance(codec, ReplayCodec) and isinstance(found.codecs[0], ReplayCodec):
        wanted = replace(codec, sample=found.codecs[0].sample)  # what the model computes is not a setting
    if found.codecs[0].to_json() != wanted.to_json():
        raise KvpackError(f"is coded by {found.codecs[0].name} with other settings")
    if header.profile and profile is None:
        raise KvpackError("was made with a profile")
    if header.chunk_tokens != chunk_of(source, codec, chunk_tokens):
        raise KvpackError(f"has chunks of {header.chunk_tokens} tokens")
    if header.dropped != kept[1] or header.source.encode() != kept[0].raw:
        raise KvpackError("holds other tensors or metadata")
    stranger = next(differing_parts(found, source), None)
    if stranger is not None:
        raise KvpackError(f"holds other data ({stranger})")
    for part in found.container.parts:
        found.container.verify(part)
    return found


def require_decompressed(target: Path, file: KvpFile, selection: Selection, engine: Engine) -> None:
    """Check that the capture ``target`` is what decompressing ``file`` gives.

    Digests tell that of a lossless file. Otherwise it is decompressed without being stored, and compared.

    Raises:
        KvpackError: It is another capture.

    """
    if file.lossless and not selection.partial:
        capture = Capture.open(target)
        if capture.file.header.raw != file.container.source.raw:
            raise KvpackError("holds other tensors or metadata")
        stranger = next(differing_parts(file, capture), None)
        if stranger is not None:
            raise KvpackError(f"holds other data ({stranger})")
    else:
        require_restorable(file, target, engine, selection)
