"""Writes the documents of docs/benchmarks.md: three that codecs are judged on, two that they are calibrated on.

    python tests/benchmarks/documents.py FOLDER

All are texts that every CPython carries. Judged: manual.txt, chapters of the language reference (prose); code.txt,
the module argparse (Python source); essay.txt, the design essay of the package email (informal prose with lists).
For calibration: calibration-manual.txt, the other chapters of the language reference; calibration-code.txt, other
modules. Nothing like the essay is calibrated on.
"""

from __future__ import annotations

import email
import importlib
import sys
from pathlib import Path

from kvpack.demo import TOPICS, demo_text

MODULES = ("textwrap", "json.decoder", "http.client", "tarfile", "statistics", "ast", "heapq", "asyncio.tasks")


def main(folder: Path) -> None:
    from pydoc_data.topics import topics

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "manual": demo_text(),
        "code": source("argparse"),
        "essay": Path(email.__file__).with_name("architecture.rst").read_text(),
        "calibration-manual": "\n".join(topics[name] for name in sorted(topics) if name not in TOPICS),
        "calibration-code": "\n".join(map(source, MODULES)),
    }.items():
        (folder / f"{name}.txt").write_text(text)


def source(module: str) -> str:
    return Path(str(importlib.import_module(module).__file__)).read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
