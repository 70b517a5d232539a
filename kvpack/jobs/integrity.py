"""Find every damaged part of a ``.kvp`` file, and save the others.

:func:`kvpack.jobs.check` ends with the first error. The functions here go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from kvpack.cache import PartSpec
from kvpack.engine import CpuEngine, Engine, Progress
from kvpack.errors import CorruptError, FormatError, naming
from kvpack.jobs.decompression import Selection, Work, results
from kvpack.jobs.reader import KvpFile, Wanted

MISSING = "kvpack_missing"
"""The key in the metadata of a salvaged capture under which the missing parts stand, as a JSON list of their labels."""


@dataclass(frozen=True)
class Damage:
    """The labels of parts that cannot be decoded, and why."""

    parts: tuple[str, ...]
    reason: str


@dataclass
class Integrity:
    """What was verified of a file.

    ``checksums`` is the number of streams whose checksums were compared. ``exact`` is the number of parts that were
    decoded and have the digest of the original, ``lossy`` of those that were decoded and have no such digest, and
    ``undecoded`` of those whose checksums alone were compared, because ``lacking`` (a profile or a model) was not
    given.
    """

    checksums: int = 0
    exact: int = 0
    lossy: int = 0
    undecoded: int = 0
    lacking: str | None = None
    damage: list[Damage] = field(default_factory=list)


def examine(file: KvpFile, *, engine: Engine | None = None, progress: Progress | None = None) -> Integrity:
    """Verify every checksum of ``file``, decode what can be decoded, and compare the digests of exact parts.

    What needs a profile or a model that was not given is verified by its checksums alone.

    Raises:
        FormatError: Parts that are coded together have different codecs.

    """
    found = Integrity(checksums=sum(len(entry.streams) for entry in file.container.parts))
    with naming(file.name):
        lacking = {number: lack for number, codec in enumerate(file.codecs) if (lack := file.lacks(codec))}
        unread = set(lacking) | set(_without_tokens(file, lacking))
        numbers = {entry.spec: entry.codec for entry in file.container.parts}

        def wanted(part: PartSpec) -> bool:
            return numbers[part] not in unread

        for parts, damage in _decoded(file, wanted, engine, progress):
            if damage is not None:
                found.damage.append(damage)
                continue
            exact = sum(file.codecs[numbers[part]].exact(part) for part in parts)
            found.exact, found.lossy = found.exact + exact, found.lossy + len(parts) - exact
        for entry in file.container.parts:
            if entry.codec in unread:
                found.undecoded, found.lacking = found.undecoded + 1, lacking.get(entry.codec, found.lacking)
                try:
                    file.container.verify(entry)
                except CorruptError as error:
                    found.damage.append(Damage((entry.spec.label,), str(error)))
    return found


@dataclass(frozen=True)
class Salvaged:
    """What was saved of a file: the number of its parts, those that were lost, and how many tokens are whole.

    ``whole`` is the number of tokens, counted from the first, of which every layer was saved. ``left_out`` are the
    tensors of which nothing was saved, or that were not selected.
    """

    parts: int
    damage: list[Damage]
    whole: int
    left_out: list[str]


def salvage(
    file: KvpFile,
    output: BinaryIO,
    selection: Selection | None = None,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Salvaged:
    """Write the capture that ``file`` holds to ``output``, without the parts that cannot be decoded.

    Rows that are lost are NaN, or zero in dtypes that have no NaN, and the metadata ``kvpack_missing`` names their
    parts. Tensors of which nothing is left are left out. Without damage, the result is that of
    :func:`kvpack.jobs.decompress`. The file is decoded twice, because the metadata precede what they tell.

    Raises:
        CorruptError: Nothing can be saved.
        MismatchError: A profile or a model is needed, and it was not given.
        UsageError: The selection reaches outside the cache.

    """
    with naming(file.name):
        file.require_whole()
        chosen = (selection or Selection()).of(file.tensors)
        engine = engine or CpuEngine()
        plain = Work(file, chosen, engine, progress)
        blind = _without_tokens(file, {})
        selected = [entry for entry in file.container.parts if plain.selected(entry.spec)]
        numbers = {entry.spec: entry.codec for entry in selected}
        damage = [
            Damage((part.label,), f"needs the token ids, which are damaged: {blind[number]}")
            for part, number in numbers.items()
            if number in blind
        ]
        every = _decoded(file, lambda part: part in numbers and numbers[part] not in blind, engine, None)
        damage += [found for _, found in every if found is not None]
        lost = {label for found in damage for label in found.parts}
        lost &= {part.label for part in numbers}
        kept = {part.tensor.name for part in numbers if part.label not in lost}
        empty = {name for name in chosen if not file.tensors[name].elements}
        if numbers and not kept:
            raise CorruptError(f"nothing can be salvaged: {damage[0].reason}")
        if lost:
            left = {name: cut for name, cut in chosen.items() if name in kept | empty}
            labels = [part.label for part in numbers if part.label in lost]
            plain = Work(file, left, engine, progress, lost=lost, metadata={MISSING: json.dumps(labels)})
        plain.write(output)
    first = [part.first for part in numbers if part.tensor.layer is not None and part.label in lost]
    return Salvaged(
        len(numbers), damage, min([file.spec.rows, *first]), [name for name in file.tensors if name not in plain.chosen]
    )


def _without_tokens(file: KvpFile, lacking: dict[int, str]) -> dict[int, str]:
    """Return the numbers of codecs that cannot decode because the token ids are damaged, and how they are."""
    needy = [number for number, codec in enumerate(file.codecs) if codec.traits.needs and number not in lacking]
    if needy:
        try:
            file.context()
        except FormatError as error:
            return dict.fromkeys(needy, str(error).removeprefix(f"{file.name}: "))
    return {}


def _decoded(
    file: KvpFile, wanted: Wanted, engine: Engine | None, progress: Progress | None
) -> Iterator[tuple[tuple[PartSpec, ...], Damage | None]]:
    """Decode the blocks that are wanted, and yield the parts of each, and what is wrong with it."""
    done, total = 0, sum(spec.nbytes for spec in file.tensors.values())
    for task, result in results(engine or CpuEngine(), file.tasks(wanted)):
        if result.error is not None and not isinstance(result.error, FormatError):
            raise result.error
        parts, error = task.block.parts, result.error
        yield parts, None if error is None else Damage(tuple(part.label for part in parts), str(error))
        done += task.nbytes
        if progress:
            progress(done, total)
