"""Holds a bench's results and sums them up over documents.

The rows are written to one JSON file, which a later run continues.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kvpack.bench.detail import Detail
from kvpack.errors import FormatError, UsageError
from kvpack.formats.input import read_file
from kvpack.formats.output import atomic_output

SCHEMA_VERSION = 3
READABLE = (2, SCHEMA_VERSION)
"""Rows of schema 2 have no ``decode_flops``; no codec of that time ran a model."""

TOKEN_ENTROPY = "token-entropy"
"""The row of the sequence bound: the bits of the tokens, from which the model itself makes the cache again."""

REPLAY = "replay"
"""The codec that keeps tokens and runs the model again."""

RECOMPUTE = "recompute"
"""The row of :mod:`kvpack.bench.recompute`: the tokens as 32-bit integers, and the seconds of running the model."""

NOISE = "hardware-noise-"
"""What the names of :mod:`kvpack.bench.noise` begin with."""


Key = tuple[str, str, int]
"""A document's digest, a codec's name and a seed."""


@dataclass(frozen=True)
class Row:
    """What one codec did with one seed to one document.

    ``document`` is the capture's file name, ``document_sha256`` the hash of its contents. Errors are those of
    ``kvpack verify``. Seconds are those of the second of two runs. ``model`` is ``ModelReport.to_json()``, or None
    where no model ran. A bound (``kvpack.bench.bounds``) is attained by no file, so its ``size``, ``ratio`` and seconds
    are None. ``decode_flops`` are the floating-point operations of running the model to decode: 0 for codecs that run
    none, None for what is no way to store a cache. The row of the token entropy has nothing but its bits and these.
    Rows of hardware noise have the bits of an uncompressed cache.
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
    decode_flops: int | None = None

    @property
    def key(self) -> Key:
        """Key that is unique for each row of a file: document digest, codec and seed."""
        return self.document_sha256, self.codec, self.seed

    @property
    def bound(self) -> bool:
        """Whether the row is of a bound, and not of a codec."""
        return self.size is None and not self.noise

    @property
    def noise(self) -> bool:
        """Whether the row is of hardware noise."""
        return self.codec.startswith(NOISE)


@dataclass
class Results:
    """Everything that ``kvpack bench`` writes. All rows of a file must have been made with the same ``setting``.

    ``details`` has what a page shows beside a row, by the row's key, where a page was asked for.
    """

    setting: dict[str, Any]
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    details: dict[Key, Detail] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The same in types that JSON has, with ``schema_version``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "setting": self.setting,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            **({"details": [[*key, detail.to_json()] for key, detail in self.details.items()]} if self.details else {}),
        }

    def write(self, path: Path, mode: int | None = None) -> None:
        """Write the file, whole or not at all, with the permissions ``mode`` or those of any new file."""
        with atomic_output(path, force=True, mode=mode) as sink:
            sink.write(json.dumps(self.to_json(), indent=1).encode() + b"\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that :meth:`write` has written.

        Raises:
            FormatError: The file is not such a file.

        """
        return cls.parse(read_file(path), str(path))

    @classmethod
    def parse(cls, raw: bytes, path: str) -> Results:
        """Parse what :meth:`write` has written. The errors are those of :meth:`read`; messages name ``path``."""
        try:
            document = json.loads(raw)
            if document["schema_version"] not in READABLE:
                raise FormatError(f"{path}: results of schema {document['schema_version']}, not {SCHEMA_VERSION}")
            setting, machine = document["setting"], document["machine"]
            if not isinstance(setting, dict) or not isinstance(machine, dict):
                raise TypeError("the setting or the machine is not an object")
            details = {_key(*key): Detail.parse(detail) for *key, detail in document.get("details", ())}
            return cls(setting, machine, [_row(row) for row in document["rows"]], details)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"{path}: not the results of kvpack bench ({error})") from None

    def resume(self, path: Path) -> None:
        """Take over the rows of the file ``path``, if it is there.

        Raises:
            UsageError: They were made with another model or with other versions.

        """
        if not path.exists():
            return
        earlier = Results.read(path)
        for name, value in self.setting.items():
            if earlier.setting.get(name) != value:
                raise UsageError(
                    f"{path}: made with another {name} ({earlier.setting.get(name)}): use -f to start anew"
                )
        self.rows, self.details = earlier.rows, earlier.details


def _row(document: dict[str, Any]) -> Row:
    """A row as files have it; of schema 2, with the operations that codecs of that time took.

    Raises:
        TypeError, KeyError: A field is missing or unknown, or is not of its type.

    """
    row = Row(**document)
    for name in ("document", "document_sha256", "codec"):
        _require(name, isinstance(getattr(row, name), str))
    _require("seed", type(row.seed) is int)
    for name, metric in {"size": lambda row: row.size, **METRICS}.items():
        value = metric(row)
        _require(name, value is None or isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63))
    return row if "decode_flops" in document or row.size is None else replace(row, decode_flops=0)


def _key(digest: Any, codec: Any, seed: Any) -> Key:
    _require("key", isinstance(digest, str) and isinstance(codec, str) and type(seed) is int)
    return digest, codec, seed


def _require(field: str, sound: bool) -> None:
    if not sound:
        raise TypeError(f"a row's {field} is not of its type")


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
    "decode_flops": lambda row: row.decode_flops,
}
"""The figures that a summary holds, by name, each with how a row gives it."""


def _model(row: Row, test: str, figure: str) -> float | None:
    part = row.model[test] if row.model else None
    return part[figure] if part else None


@dataclass(frozen=True)
class Interval:
    """A mean over documents, and the half width of its 95 % confidence interval.

    Of one document alone there is no interval, and ``half`` is None.
    """

    mean: float
    half: float | None


@dataclass(frozen=True)
class Summary:
    """Summary of a codec: each document is averaged over seeds first, then the documents are averaged."""

    codec: str
    documents: int
    bound: bool
    noise: bool
    figures: dict[str, Interval]


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Return the summaries of all codecs, in the order of their first rows."""
    by_codec: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_codec.setdefault(row.codec, {}).setdefault(row.document_sha256, []).append(row)
    summaries = []
    for codec, documents in by_codec.items():
        first = next(iter(documents.values()))[0]
        figures = _figures(list(documents.values()))
        summaries.append(Summary(codec, len(documents), first.bound, first.noise, figures))
    return summaries


def _figures(documents: list[list[Row]]) -> dict[str, Interval]:
    figures = {}
    for name, metric in METRICS.items():
        values = [[value for row in rows if (value := metric(row)) is not None] for rows in documents]
        if all(values):
            figures[name] = interval([mean(some) for some in values])
    return figures


def interval(values: list[float]) -> Interval:
    """The mean of some values and the half width of its 95 % confidence interval, by Student's t.

    Raises:
        UsageError: There is more than one value, and scipy is not installed.

    """
    if len(values) < 2:
        return Interval(values[0], None)
    return Interval(mean(values), student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)))


@cache
def student_t(degrees: int) -> float:
    """The quantile of Student's t distribution for a two-sided 95 % interval, at so many degrees of freedom.

    Raises:
        UsageError: scipy is not installed.

    """
    try:
        from scipy.stats import t
    except ImportError:
        raise UsageError("confidence intervals need scipy: pip install 'kvpack[bench]'") from None
    return float(t.ppf(0.975, degrees))


def compare(old: Results, new: Results) -> list[tuple[str, str, float, float]]:
    """Name what moved by more than one percent, over the documents that both results have.

    Each is given as its codec, its metric, the old mean and the new one. Seconds are left out, because they move with
    the load of the machine.

    Raises:
        UsageError: There is more than one document, and scipy is not installed.

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
