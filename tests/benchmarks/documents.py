"""Writes the documents that docs/benchmarks.md judges codecs on: three styles of text that every CPython carries.

    python tests/benchmarks/documents.py FOLDER

manual.txt: chapters of the language reference (prose); code.txt: the module argparse (Python source); essay.txt:
the design essay of the package email (informal prose with lists).
"""

from __future__ import annotations

import argparse
import email
import sys
from pathlib import Path

from kvpack.demo import demo_text


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    essay = Path(email.__file__).with_name("architecture.rst")
    for name, text in {
        "manual": demo_text(),
        "code": Path(argparse.__file__).read_text(),
        "essay": essay.read_text(),
    }.items():
        (folder / f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
