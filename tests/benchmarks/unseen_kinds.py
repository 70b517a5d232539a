"""Calibrates with all kinds of text and with some left out, and judges ``fisher`` on documents of each kind.

    python tests/benchmarks/documents.py docs-text
    python tests/benchmarks/unseen_kinds.py docs-text results --device cuda --jobs 3

A document is judged with the profile of all kinds (its kind was seen, its text was not) and with one that was made
without its kind. Profiles, captures and results are kept in the folder ``results``, and what is there is not made
again. The tables of docs/benchmarks.md are printed at the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvpack.bench.report import COLUMNS, cells
from kvpack.bench.results import RECOMPUTE, Results, Row, summarize

CALIBRATION = ("--gradients", "60", "--units", "1024", "--steps", "2500")
SEQUENCES = 10
"""Number of sequences of 2,048 tokens that are taken of each kind."""

NINE = ("manual", "code", "essay", "changelog", "licence", "docstrings", "manpage", "handbook", "novel")
"""The documents of the means; the first six are also judged with other codecs."""

SHOWN = (
    "bits",
    "ratio",
    "kl_plain",
    "kl_repeat",
    "ppl_plain",
    "ppl_repeat",
    "top1_plain",
    "needles",
    "attention_error",
)
"""Columns of the means."""


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder that documents.py has written")
    parser.add_argument("results", type=Path, help="folder for profiles, captures and results")
    parser.add_argument("--model", help="model, as for kvpack")
    parser.add_argument("--device", default="auto", help="device, as for kvpack")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    parser.add_argument("--folds", help="calibrate only these, comma-separated: 'all' or the number of a fold")
    parser.add_argument("--codecs", default="fisher", help="codecs to judge, as for kvpack bench")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    found = json.loads((options.texts / "documents.json").read_text())
    folds = {"all": ()} | {str(i): tuple(kinds) for i, kinds in enumerate(found["folds"])}
    wanted = options.folds.split(",") if options.folds else list(folds)
    model = ("--model", options.model) if options.model else ()
    with ThreadPoolExecutor(options.jobs) as pool:
        made = [pool.submit(calibrate, options, name, folds[name], model) for name in wanted]
        for future in made:
            future.result()
        if options.folds:
            return
        names = sorted(path.stem for path in options.texts.glob("*.txt") if not path.stem.startswith("calibration-"))
        list(pool.map(lambda name: capture(options, name, model), names))
        pairs = [
            (name, fold) for name in names for fold in folds if fold == "all" or found["kinds"].get(name) in folds[fold]
        ]
        list(pool.map(lambda pair: bench(options, *pair, model), pairs))
    table(options.results, names, found["kinds"], folds)


def run(log: Path, *arguments: object) -> None:
    """Run ``kvpack`` with these arguments; what it prints goes to ``log``."""
    with log.open("w") as sink:
        command = [sys.executable, "-m", "kvpack", *map(str, arguments)]
        subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, check=True)


def calibrate(options: argparse.Namespace, name: str, without: Sequence[str], model: Sequence[str]) -> None:
    """Make the profile ``NAME.kvprofile`` from all kinds of text but those of ``without``."""
    output = options.results / f"{name}.kvprofile"
    paths = [path for path in sorted(options.texts.glob("calibration-*.txt")) if path.stem[12:] not in without]
    if not output.exists():
        texts = [word for path in paths for word in ("--text", path)]
        size = ("--tokens", 2048 * SEQUENCES * len(paths), *CALIBRATION)
        run(output.with_suffix(".log"), "calibrate", *texts, "-o", output, *size, "--device", options.device, *model)


def capture(options: argparse.Namespace, name: str, model: Sequence[str]) -> None:
    """Capture the cache of a document."""
    output = options.results / f"{name}.safetensors"
    needles = () if name.startswith("other-") else ("--needles", 8)
    if not output.exists():
        size = ("--max-tokens", 1792, *needles, "--device", options.device, *model)
        run(output.with_suffix(".log"), "capture", "--text", options.texts / f"{name}.txt", "-o", output, *size)


def bench(options: argparse.Namespace, name: str, fold: str, model: Sequence[str]) -> None:
    """Judge the codecs on a document with the profile of ``fold``."""
    output, profile = options.results / f"{name}.{fold}.json", options.results / f"{fold}.kvprofile"
    if not output.exists():
        judge = ("--codecs", options.codecs, "--quick", "--device", options.device, *model)
        capture = options.results / f"{name}.safetensors"
        run(output.with_suffix(".log"), "bench", capture, "-D", profile, "-o", output, "-q", *judge)


def table(results: Path, names: Sequence[str], kinds: dict[str, str], folds: dict[str, Sequence[str]]) -> None:
    """Print ratio and KL of each document and codec, then the means of docs/benchmarks.md."""
    heads = [f"{head}, kind {kind}" for kind in ("seen", "left out") for head in ("ratio", "KL plain", "KL repeat")]
    print("| document | codec | " + " | ".join(heads) + " |")
    print("| --- | --- |" + " --- |" * 6)
    seen = {name: Results.read(results / f"{name}.all.json") for name in names}
    unseen = {}
    for name in names:
        fold = next((fold for fold, without in folds.items() if kinds.get(name) in without), "all")
        unseen[name] = Results.read(results / f"{name}.{fold}.json")
        new = {row.codec: row for row in unseen[name].rows}
        for row in seen[name].rows:
            if row.codec != RECOMPUTE:
                print(
                    f"| {name} | {row.codec} | "
                    + " | ".join(map(_short, (*figures(row), *figures(new[row.codec]))))
                    + " |"
                )
    for kind, found in (("left out", unseen), ("seen", seen)):
        for documents in (NINE, NINE[:6]):
            print(f"\nMeans with 95 % confidence, kind {kind}: {', '.join(documents)}.\n")
            means([found[name] for name in documents])


def figures(row: Row) -> tuple[float, float, float]:
    """Return ratio and KL, plain and repeated."""
    assert row.ratio is not None
    assert row.model is not None
    return row.ratio, row.model["plain"]["kl_mean"], row.model["repeat"]["kl_mean"]


def means(found: Sequence[Results]) -> None:
    """Print a row of means for each codec, and the ratios at which the largest mean KL of either text is a limit."""
    summaries = [s for s in summarize([row for each in found for row in each.rows]) if s.codec != RECOMPUTE]
    print("| codec | " + " | ".join(COLUMNS[name][0] for name in SHOWN) + " |")
    print("| --- |" + " --- |" * len(SHOWN))
    for summary in summaries:
        codec, bits, _, *rest = cells(summary, SHOWN)
        ratio = summary.figures["ratio"]
        print(f"| {codec} | {bits} | {ratio.mean:.1f} ± {ratio.half or 0:.1f} | " + " | ".join(rest) + " |")
    kl = np.log([[s.figures[name].mean for name in ("kl_plain", "kl_repeat")] for s in summaries])
    ratios = np.log([s.figures["ratio"].mean for s in summaries])
    for what, columns, limit in (("plain", [0], 0.03), ("both", [0, 1], 0.03), ("both", [0, 1], 0.06)):
        at = np.interp(np.log(limit), kl[:, columns].max(1), ratios)
        print(f"\nRatio at a KL of {limit} nats, {what}, by interpolation: {np.exp(at):.0f}")


def _short(x: float) -> str:
    return f"{x:.1f}" if x >= 10 else f"{x:.4f}" if x < 1 else f"{x:.2f}"


if __name__ == "__main__":
    main()
