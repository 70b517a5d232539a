"""Imports only go down, from the command line to the errors, and form no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS: list[str] = [
    "errors",
    "numerics",
    "cache",
    "formats",
    "kvp",
    "profiles",
    "codecs",
    "engine",
    "gpu",
    "capture",
    "fidelity",
    "jobs",
    "store",
    "calibration",
    "bench",
    "cli",
    "__main__",
]
"""Packages of ``kvpack/``, lowest first. A package may import packages below it, and its own modules."""

ONLY_IN_CLI = {"typer", "rich"}
FILES = sorted((ROOT / "kvpack").rglob("*.py"))


def package(path: Path) -> str:
    return path.relative_to(ROOT / "kvpack").parts[0].removesuffix(".py")


def imported_at_start(path: Path) -> set[str]:
    """Dotted names of the modules that are imported when a file is: not those for type checkers or within functions."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) == "TYPE_CHECKING", f"{path}: an import may hide in this condition"
    return names


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            if node.module == "kvpack":
                names.update(f"kvpack.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    if path == ROOT / "kvpack" / "__init__.py":
        assert imported_at_start(path) <= {"__future__", "typing"}  # starting takes no time
        return
    own = package(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0].removeprefix("__version__")
        if top in ONLY_IN_CLI:
            assert own == "cli", f"{name} belongs in cli"
        if top == "kvpack" and target and target != own:
            assert LAYERS.index(target) < LAYERS.index(own), f"{own} imports {target}"


def test_the_top_level_is_small() -> None:
    entries = {path.name for path in (ROOT / "kvpack").iterdir()} - {"__pycache__"}
    assert len(entries - {"__init__.py", "__main__.py", "py.typed"}) <= 16


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_stages_do_not_know_of_each_others_kinds() -> None:
    """An entropy coder imports no quantizer, a quantizer no transform."""
    for path in (ROOT / "kvpack" / "codecs" / "chain" / "entropy").rglob("*.py"):
        assert not any(".quantizers" in n or ".transforms" in n for n in imported(path))
    for path in (ROOT / "kvpack" / "codecs" / "chain" / "quantizers").rglob("*.py"):
        assert not any(".entropy" in n or ".transforms" in n for n in imported(path))


@pytest.mark.parametrize("pattern", ["cache/*.py", "kvp/*.py", "formats/safetensors.py", "formats/captures.py"])
def test_what_inspect_reads_with_needs_no_numpy_and_no_torch(pattern: str) -> None:
    for path in (ROOT / "kvpack").glob(pattern):
        tree = ast.parse(path.read_text())
        for node in tree.body:  # imports when the module is loaded
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not any(n.split(".")[0] in {"torch", "numpy", "numba"} for n in names), path


def test_kernels_know_no_files() -> None:
    for path in (ROOT / "kvpack" / "gpu" / "kernels").rglob("*.py"):
        assert not any(n.startswith(("kvpack.formats", "kvpack.kvp", "kvpack.gpu.engine")) for n in imported(path))


def test_encoding_does_not_import_evaluation() -> None:
    """What ``compress`` needs is found without ``fidelity``; only the search for a rate evaluates."""
    for name in ("codecs", "engine", "gpu", "kvp", "formats", "cache"):
        for path in (ROOT / "kvpack" / name).rglob("*.py"):
            assert not any(n.startswith("kvpack.fidelity") for n in imported(path))
