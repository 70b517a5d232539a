"""Results of ``kvpack bench``: rows in one JSON file, which a later run can continue, and their summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kvpack.errors import FormatError, UsageError
from kvpack.formats.output import atomic_output

SCHEMA_VERSION = 2
TOKEN_ENTROPY = "token-entropy"
"""Name of the row of the sequence bound: the bits of the tokens, from which the model can compute the cache again."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t of two-sided 95 % intervals for 1 to 10 degrees of freedom; above 10, the normal's 1.960 is used."""


@dataclass(frozen=True)
class Row:
    """Results of one codec with one seed on one document.

    Errors are those of ``kvpack verify``. Seconds are those of the second of two runs. ``document`` is the file name of
    the capture and ``document_sha256`` its digest. ``model`` is ``ModelReport.to_json()``, or None if no model ran. A
    bound (``kvpack.bench.bounds``) has no file, so its ``size``, ``ratio`` and seconds are None. For the token entropy,
    all figures except the bits are None.
    """

    document: str
    document_sha256: str
    codec: str
    seed: int
    size: int | None
    ratio: float | None
    bits_per_element: float
    keys_nmse: float | None
    values_nmse: float | None
    attention_error: float | None
    compress_seconds: float | None
    decompress_seconds: float | None
    model: dict[str, Any] | None

    @property
    def key(self) -> tuple[str, str, int]:
        """Key that is unique for each row of a file: document digest, codec and seed."""
        return self.document_sha256, self.codec, self.seed

    @property
    def bound(self) -> bool:
        """Whether the row is of a bound and not of a codec."""
        return self.size is None


@dataclass
class Results:
    """All that ``kvpack bench`` writes.

    ``setting`` is what all rows of a file must have in common, so that they can be compared.
    """

    setting: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the results with JSON types only, with ``schema_version``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "setting": self.setting,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Write the results to ``path`` atomically."""
        with atomic_output(path, force=True) as sink:
            sink.write(json.dumps(self.to_json(), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that :meth:`write` wrote.

        Raises:
            FormatError: The file is not such a file, or has another schema version.

        """
        try:
            document = json.loads(path.read_bytes())
            if document["schema_version"] != SCHEMA_VERSION:
                raise FormatError(f"{path}: results of schema {document['schema_version']}, not {SCHEMA_VERSION}")
            return cls(document["setting"], document["machine"], [Row(**row) for row in document["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: not the results of kvpack bench ({error})") from None

    def resume(self, path: Path) -> None:
        """Take over the rows of the file ``path``, if it exists.

        Raises:
            UsageError: The rows were measured with another setting, such as another model or other versions.

        """
        if not path.exists():
            return
        earlier = Results.read(path)
        for name, value in self.setting.items():
            if earlier.setting.get(name) != value:
                raise UsageError(
                    f"{path}: made with another {name} ({earlier.setting.get(name)}): use -f to start anew"
                )
        self.rows = earlier.rows


METRICS: dict[str, Callable[[Row], float | None]] = {
    "bits": lambda row: row.bits_per_element,
    "ratio": lambda row: row.ratio,
    "keys_nmse": lambda row: row.keys_nmse,
    "values_nmse": lambda row: row.values_nmse,
    "attention_error": lambda row: row.attention_error,
    "kl_plain": lambda row: _model(row, "plain", "kl_mean"),
    "kl_repeat": lambda row: _model(row, "repeat", "kl_mean"),
    "ppl_plain": lambda row: _model(row, "plain", "ppl_change"),
    "ppl_repeat": lambda row: _model(row, "repeat", "ppl_change"),
    "top1_plain": lambda row: _model(row, "plain", "top1"),
    "greedy": lambda row: row.model["greedy_identical"] if row.model else None,
    "needles": lambda row: row.model["needles_found"] if row.model else None,
    "needles_original": lambda row: row.model["needles_found_original"] if row.model else None,
    "compress_seconds": lambda row: row.compress_seconds,
    "decompress_seconds": lambda row: row.decompress_seconds,
}
"""Metrics of a summary by name; each takes a row and returns a figure, or None if the row does not have it."""


def _model(row: Row, test: str, figure: str) -> float | None:
    part = row.model[test] if row.model else None
    return part[figure] if part else None


@dataclass(frozen=True)
class Interval:
    """A mean over documents and the half width of its 95 % confidence interval, which is None for one document."""

    mean: float
    half: float | None


@dataclass(frozen=True)
class Summary:
    """Summary of a codec: each document is averaged over seeds first, then the documents are averaged."""

    codec: str
    documents: int
    bound: bool
    figures: dict[str, Interval]


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Return the summaries of all codecs, in the order of their first rows."""
    by_codec: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_codec.setdefault(row.codec, {}).setdefault(row.document_sha256, []).append(row)
    return [
        Summary(codec, len(documents), next(iter(documents.values()))[0].bound, _figures(list(documents.values())))
        for codec, documents in by_codec.items()
    ]


def _figures(documents: list[list[Row]]) -> dict[str, Interval]:
    figures = {}
    for name, metric in METRICS.items():
        values = [[value for row in rows if (value := metric(row)) is not None] for rows in documents]
        if all(values):
            figures[name] = interval([mean(some) for some in values])
    return figures


def interval(values: list[float]) -> Interval:
    """Return the mean and the half width of its 95 % confidence interval by Student's t."""
    if len(values) < 2:
        return Interval(values[0], None)
    quantile = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.960
    return Interval(mean(values), quantile * stdev(values) / math.sqrt(len(values)))


def compare(old: Results, new: Results) -> list[tuple[str, str, float, float]]:
    """Return codec, metric, old mean and new mean of every metric that changed by more than one percent.

    Only rows that both results have are compared. Seconds are left out, because they vary between runs.
    """
    common = {row.key for row in old.rows} & {row.key for row in new.rows}
    before, after = (
        {summary.codec: summary.figures for summary in summarize(row for row in results.rows if row.key in common)}
        for results in (old, new)
    )
    return [
        (codec, name, figure.mean, after[codec][name].mean)
        for codec, figures in before.items()
        for name, figure in figures.items()
        if not name.endswith("seconds") and name in after[codec]
        if abs(after[codec][name].mean - figure.mean) > 0.01 * abs(figure.mean)
    ]
