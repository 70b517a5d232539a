"""Writes the documents of docs/benchmarks.md, from texts that CPython and kvpack's own dependencies carry.

    python tests/benchmarks/documents.py FOLDER

needs ``pip install -e '.[capture,test]'`` and writes three kinds of files:

- ``manual``, ``code``, ``essay``, ``changelog``, ``licence``, ``docstrings``: what codecs are judged on;
- ``other-*``: far from anything calibrated (Chinese, Japanese and Korean; tables; markup; C++; chat), to see how a
  calibrated codec generalises;
- ``calibration-*``: what profiles are made from. Paragraphs and lines of 80 characters or more that a judged or other
  document has too are dropped. Nothing like the essay, the licence or an ``other-*`` document is calibrated on; of the
  manual, code, changelog and docstrings the kind is, the text is not.

The text depends on the versions of Python and of the packages; ``documents.json`` says which, with a SHA-256 a file.
A text that an installation lacks (Debian packs ``test`` and ``idlelib`` apart from Python) is named and left out.
"""

# ruff: noqa: PLW0108 (a text that is missing must say so when it is read, not when it is listed)

from __future__ import annotations

import ast
import hashlib
import heapq
import importlib.metadata
import importlib.util
import json
import pkgutil
import platform
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from kvpack.bench.demo import TOPICS, demo_text

Texts = dict[str, Callable[[], str]]
PARAGRAPH = 80
"""Characters from which a paragraph counts as an overlap."""

CODE = (
    *("textwrap", "json.decoder", "http.client", "tarfile", "statistics", "ast", "shelve", "asyncio.tasks"),
    *("dataclasses", "difflib", "fractions", "csv", "subprocess", "logging", "sqlite3.dbapi2", "zipfile"),
)
PACKAGES_CODE = ("networkx.classes.graph", "networkx.algorithms.shortest_paths.weighted", "rich.console", "rich.text")
READMES = ("rich", "typer", "tqdm", "pluggy", "packaging", "hypothesis", "regex", "huggingface_hub", "jinja2")


def judged() -> Texts:
    """Documents that codecs are judged on: name to text."""
    return {
        "manual": demo_text,
        "code": lambda: source("argparse"),
        "essay": lambda: (folder_of("email") / "architecture.rst").read_text() + heapq.__about__,
        "changelog": lambda: (folder_of("idlelib") / "NEWS.txt").read_text(),
        "licence": lambda: distribution_file("hypothesis", "LICENSE.txt"),
        "docstrings": lambda: docstrings("networkx.algorithms.flow", "networkx.algorithms.centrality"),
    }


def other() -> Texts:
    """Documents unlike anything calibrated: name to text."""
    return {
        "other-cjk": cjk,
        "other-csv": lambda: (folder_of("matplotlib") / "mpl-data" / "sample_data" / "Stocks.csv").read_text(),
        "other-json": lambda: (folder_of("torch") / "_dynamo" / "graph_break_registry.json").read_text(),
        "other-html": lambda: (folder_of("idlelib") / "help.html").read_text(),
        "other-cpp": lambda: (folder_of("torch") / "include" / "ATen" / "core" / "TensorBase.h").read_text(),
        "other-chat": chat,
    }


def calibration() -> Texts:
    """What profiles are made from: name to text."""
    return {
        "calibration-manual": manual,
        "calibration-code": lambda: "\n".join(map(source, CODE)),
        "calibration-packages": lambda: "\n".join(map(source, PACKAGES_CODE)),
        "calibration-torch": lambda: docstrings("torch.nn.modules", "torch.optim", "torch.distributions"),
        "calibration-numpy": lambda: docstrings("numpy.lib", "numpy.linalg", "numpy.polynomial", "numpy.ma"),
        "calibration-sympy": lambda: docstrings("sympy.core", "sympy.functions", "sympy.geometry"),
        "calibration-transformers": lambda: docstrings("transformers.generation", "transformers.models.auto"),
        "calibration-matplotlib": lambda: docstrings("matplotlib"),
        "calibration-changelog": lambda: str(importlib.metadata.distribution("fonttools").metadata.get_payload()),
        "calibration-readmes": readmes,
        "calibration-tests": lambda: source("sympy.core.tests.test_expr") + source("networkx.classes.tests.test_graph"),
        "calibration-unicode": unicode_table,
    }


def main(folder: Path) -> None:
    """Write all documents and ``documents.json`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = {name: text for name, text in read(judged() | other()).items() if text}
    calibrated = read(calibration())
    known = {paragraph for text in held_out.values() for paragraph in paragraphs(text)}
    calibrated = {name: without(text, known) for name, text in calibrated.items()}
    lines = {line for text in held_out.values() for line in text.splitlines() if len(line) >= PARAGRAPH}
    for name, text in calibrated.items():
        calibrated[name] = "\n".join(line for line in text.splitlines() if line not in lines)
    digests = {}
    for name, text in (held_out | calibrated).items():
        (folder / f"{name}.txt").write_text(text)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
    packages = ("torch", "sympy", "networkx", "numpy", "matplotlib", "fonttools", "transformers", "hypothesis")
    versions = {name: importlib.metadata.version(name) for name in packages}
    made_with = {"python": platform.python_version(), **versions}
    (folder / "documents.json").write_text(json.dumps({"made_with": made_with, "sha256": digests}, indent=1) + "\n")


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


def folder_of(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"no package {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def source(module: str) -> str:
    """A module's source; only the packages above it are imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"no module {module}")
    return Path(spec.origin).read_text()


def docstrings(*packages: str) -> str:
    """Docstrings of all public functions, classes and modules below ``packages``, tests apart; read, not imported."""
    found: dict[str, None] = {}
    for package in packages:
        top, *below = package.split(".")
        folder = folder_of(top).joinpath(*below)
        for path in sorted(folder.rglob("*.py")):
            if "tests" in path.relative_to(folder).parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    name = getattr(node, "name", path.stem)
                    if text and not name.startswith("_") and len(text) > 200:
                        found[f"{name}\n\n{text}\n\n"] = None
    return "".join(found)


def distribution_file(distribution: str, name: str) -> str:
    """A file of a package's metadata, by the end of its path."""
    files = importlib.metadata.files(distribution) or []
    path = next((file for file in files if str(file).endswith(name)), None)
    if path is None:
        raise ImportError(f"{distribution} has no {name}")
    return path.read_text()


def manual() -> str:
    """The chapters of the language reference that the manual and the chat do not take."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics) if name not in TOPICS)


def readmes() -> str:
    """Long descriptions of packages."""
    texts = [importlib.metadata.distribution(name).metadata for name in READMES]
    return "\n".join(str(text.get_payload() or text.get("Description", "")) for text in texts)


def unicode_table() -> str:
    """Characters with names, categories and decimal values, as in the Unicode database."""
    rows = []
    for code in (*range(0x20, 0x590), *range(0x2000, 0x2C00)):
        name = unicodedata.name(chr(code), "")
        if name:
            rows.append(f"{code:04X};{name};{unicodedata.category(chr(code))};{unicodedata.decomposition(chr(code))}")
    return "\n".join(rows)


def cjk() -> str:
    """Short texts in Chinese, Japanese and Korean, from CPython's own tests of its codecs."""
    texts = [path.read_text() for path in sorted((folder_of("test") / "cjkencodings").glob("*-utf8.txt"))]
    return "\n".join(dict.fromkeys(texts))


def chat() -> str:
    """Questions and answers in SmolLM2's chat format: the answers are docstrings of the standard library."""
    turns = []
    for package in (m.name for m in pkgutil.iter_modules([str(folder_of("json").parent)])):
        if package in ("__phello__", "antigravity", "argparse", "this") or package in CODE:
            continue
        try:
            text = ast.get_docstring(ast.parse(source(package)))
        except (OSError, ImportError, SyntaxError):
            continue
        if text and 80 < len(text) < 1500:
            question = f"<|im_start|>user\nWhat is Python's module {package} good for?<|im_end|>\n"
            turns.append(f"{question}<|im_start|>assistant\n{text}<|im_end|>\n")
    return "".join(turns)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
