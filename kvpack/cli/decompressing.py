"""What ``kvpack decompress`` does with its files: open and check them, decode and write, or only test, and remove."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kvpack import jobs
from kvpack.cli import batch, common
from kvpack.cli.batch import Item, Outcome
from kvpack.engine import Engine
from kvpack.engine.memory import default_limit
from kvpack.errors import CorruptError, KvpackError, UsageError
from kvpack.formats.output import sync_folder


@dataclass(frozen=True)
class Options(batch.FileOptions):
    """How to decompress files. The names are those of the command's options; ``memlimit`` is in bytes.

    ``layers`` and ``tokens`` are the selection of :class:`kvpack.jobs.Selection`.
    """

    layers: frozenset[int] | None
    tokens: tuple[int, int] | None
    approximate: bool
    salvage: bool
    memlimit: int | None
    jobs: int


class Decompressing:
    """Decompresses files, each as the options say. Files without an output are only tested."""

    def __init__(self, options: Options) -> None:
        """Open the profile."""
        self.options = options
        self.profile = common.open_profile(options.profile)
        self.selection = jobs.Selection(options.layers, options.tokens)

    def outcomes(self, items: Iterable[Item]) -> Iterator[Outcome]:
        """Decompress files and give the outcome of each, in order."""
        return batch.each(items, self._outcome)

    def _outcome(self, item: Item) -> Outcome:
        row = self._row(item)
        if not row["missing"]:
            return Outcome(str(item.path), row)
        parts = len({label for damage in row["missing"] for label in damage["parts"]})
        error = f"{item.path}: {parts} of {row['parts']} parts are damaged, and missing in what was salvaged"
        return Outcome(str(item.path), row, error, CorruptError.exit_code)

    def _row(self, item: Item) -> dict[str, Any]:
        options = self.options
        title = f"{'testing' if item.target is None else 'decompressing'} {item.path.name}"
        if item.target is not None:
            batch.prepare_output(item.target, options, [options.profile, common.model_files(options.model)])
        with common.readable(item.path) as source, common.progress_bar(title, options.quiet) as progress:
            file = jobs.KvpFile.open(
                source, self.profile, str(item.path), approximate=options.approximate, damaged=options.salvage
            )
            if options.remove and file.needs_model:
                raise UsageError(f"{item.path}: --rm is refused with replay: only some machines can make it again")
            file.memlimit = options.memlimit or default_limit() // options.jobs
            common.attach_model(file, options.model, options.device, progress)
            exact = all(codec.lossless for codec in file.codecs)
            engine = common.engine(options.device, [source], options.threads, options.quiet, exact=exact)
            left_out: list[str] = []
            skipped, saved = False, None
            if item.target is None:
                jobs.check(file, engine=engine, progress=progress)
            elif self._is_there(item, file, engine):
                skipped = True
            else:
                with common.writable(item.target, options.force, [item.path]) as sink:
                    if options.salvage:
                        saved = jobs.salvage(file, sink, self.selection, engine=engine, progress=progress)
                        left_out = saved.left_out
                    else:
                        left_out = jobs.decompress(file, sink, self.selection, engine=engine, progress=progress)
        if options.remove and item.target is not None:
            sync_folder(item.target)
            item.path.unlink()
        return {
            "input": str(item.path),
            "output": None if item.target is None else str(item.target),
            "lossless": file.lossless,
            "skipped": skipped,
            "left_out": left_out,
            "repaired": file.container.damage,
            "missing": [asdict(damage) for damage in saved.damage] if saved else [],
            "whole_tokens": saved.whole if saved else None,
            "parts": len(file.container.parts),
            "differing": len(file.replay.differing) if file.replay else 0,
            "differing_sampled": file.replay.sampled if file.replay else 0.0,
        }

    def _is_there(self, item: Item, file: jobs.KvpFile, engine: Engine) -> bool:
        """Return whether the output need not be written, because it is there already.

        Raises:
            KvpackError: Another file is in its place.

        """
        if not self.options.resume or item.target is None or not item.target.is_file():
            return False
        try:
            jobs.require_decompressed(item.target, file, self.selection, engine)
        except KvpackError as error:
            if self.options.force:
                return False
            raise batch.other_output(item.target, error) from None
        return True
