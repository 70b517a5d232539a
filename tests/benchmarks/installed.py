"""Texts that CPython and installed packages carry. Modules are read, not imported."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import pkgutil
import unicodedata
from pathlib import Path

TOPICS = ("typesmapping", "objects", "class", "exceptions", "naming", "types")
"""Chapters of Python's language reference that are judged; the others are calibrated on."""

CODE = (
    *("textwrap", "json.decoder", "http.client", "tarfile", "statistics", "ast", "shelve", "asyncio.tasks"),
    *("dataclasses", "difflib", "fractions", "csv", "subprocess", "logging", "sqlite3.dbapi2", "zipfile"),
)
PACKAGES_CODE = ("networkx.classes.graph", "networkx.algorithms.shortest_paths.weighted", "rich.console", "rich.text")
TESTS_CODE = ("sympy.core.tests.test_expr", "networkx.classes.tests.test_graph")
DOCSTRINGS = (
    ("torch.nn.modules", "torch.optim", "torch.distributions"),
    ("numpy.lib", "numpy.linalg", "numpy.polynomial", "numpy.ma"),
    ("sympy.core", "sympy.functions", "sympy.geometry"),
    ("transformers.generation", "transformers.models.auto"),
    ("matplotlib",),
)
READMES = ("rich", "typer", "tqdm", "pluggy", "packaging", "hypothesis", "regex", "huggingface_hub", "jinja2")


def topics() -> dict[str, str]:
    """Return the chapters of Python's language reference."""
    from pydoc_data.topics import topics as found

    return dict(found)


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


def long_description(distribution: str) -> str:
    """Return what a package says of itself, which may be its list of changes."""
    return str(importlib.metadata.distribution(distribution).metadata.get_payload())


def manual() -> str:
    """The chapters of the language reference that the manual and the chat do not take."""
    return "\n".join(topics()[name] for name in sorted(topics()) if name not in TOPICS)


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
