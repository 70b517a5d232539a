"""Decompressing: all of a cache, or layers and a range of tokens; and checking that all would decompress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from kvpack.engine.threads import Progress, ordered_map
from kvpack.errors import UsageError
from kvpack.formats.safetensors import Header, TensorSpec, build_header
from kvpack.jobs.reader import Archive, as_bytes
from kvpack.kvp import layer_of

if TYPE_CHECKING:
    from kvpack.gpu.runtime.launch import Launcher


@dataclass(frozen=True)
class Selection:
    """Which part of a cache to decompress: layers by index, tokens ``[start, stop)``; None means all."""

    layers: frozenset[int] | None = None
    tokens: tuple[int, int] | None = None

    @property
    def partial(self) -> bool:
        """Whether anything is left out."""
        return self.layers is not None or self.tokens is not None

    def of(self, tensors: Mapping[str, TensorSpec]) -> dict[str, slice | None]:
        """Names of the tensors that are chosen, and the tokens of each (None: it is whole).

        Raises:
            UsageError: outside the cache.

        """
        layers = {name: layer for name, spec in tensors.items() if (layer := layer_of(spec)) is not None}
        if not layers:
            raise UsageError("this file has no layers to select from")
        wanted = self.layers if self.layers is not None else frozenset(layers.values())
        missing = sorted(wanted - set(layers.values()))
        if missing:
            raise UsageError(f"no layer {missing[0]}: the file has layers 0 to {max(layers.values())}")
        cut = slice(*self.tokens) if self.tokens else None
        chosen: dict[str, slice | None] = {name: cut for name, layer in layers.items() if layer in wanted}
        longest = min(tensors[name].shape[1] for name in chosen)
        if self.tokens and not 0 <= self.tokens[0] < self.tokens[1] <= longest:
            raise UsageError(f"tokens {self.tokens[0]}:{self.tokens[1]} are not within 0:{longest}")
        if "tokens" in tensors and len(tensors["tokens"].shape) == 1:
            chosen["tokens"] = cut
        return chosen


def decompress(
    archive: Archive,
    output: BinaryIO,
    selection: Selection | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    gpu: Launcher | None = None,
) -> list[str]:
    """Write the capture that ``archive`` holds to ``output`` (in order: may be a pipe).

    Without a selection, a losslessly compressed file comes back byte for byte. With one, the chosen layers'
    keys and values and the ``tokens`` tensor are written, cut to the range; returns the names left out.

    Raises:
        UsageError: a selection outside the cache.
        CorruptError: the file is damaged.

    """
    if selection is None or not selection.partial:
        chosen: dict[str, slice | None] = dict.fromkeys(archive.tensors)
        header, left_out = archive.container.source, []
    else:
        chosen = selection.of(archive.tensors)
        header = _cut_header(archive, chosen)
        left_out = [name for name in archive.tensors if name not in chosen]
    output.write(len(header.raw).to_bytes(8, "little") + header.raw)
    total = sum(spec.nbytes for spec in header.tensors)
    done = 0
    names = [spec.name for spec in header.tensors]
    if gpu is None or left_out or any(cut is not None for cut in chosen.values()):
        read = ordered_map(lambda name: archive.read(name, chosen[name]), names, threads)
    else:
        from kvpack.gpu import engine as device

        read = (bits for _, bits in device.read(gpu, archive, names))
    for bits in read:
        output.write(as_bytes(bits))
        done += bits.nbytes
        if progress:
            progress(done, total)
    return left_out


def _cut_header(archive: Archive, chosen: Mapping[str, slice | None]) -> Header:
    """The safetensors header of what :meth:`Selection.of` chose of ``archive``."""
    entries = []
    for name, cut in chosen.items():
        spec = archive.tensors[name]
        shape = list(spec.shape)
        if cut is not None:
            axis = 0 if name == "tokens" else 1
            start, stop, _ = cut.indices(shape[axis])
            shape[axis] = stop - start
        entries.append((name, spec.dtype, shape))
    return build_header(entries, archive.metadata)


def check(archive: Archive, *, threads: int | None = None, progress: Progress | None = None) -> None:
    """Decode everything and keep nothing: checksums, coding, and the digests of what is lossless.

    Raises:
        CorruptError: the file is damaged.

    """
    done, total = 0, sum(spec.nbytes for spec in archive.tensors.values())
    for size in ordered_map(lambda part: archive.read_part(part).nbytes, archive.parts, threads):
        done += size
        if progress:
            progress(done, total)
