"""Imports only go down: cli, then api, then what it is made of, then stages, then errors and types."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS: list[set[str]] = [
    {"errors"},
    {"tensorfile", "floats", "files", "parallel"},
    {"stages", "checksum"},
    {"codecs", "container"},
    {"pipeline", "profile"},
    {"units", "inspection", "capture", "claims"},
    {"archive", "calibration"},
    {"fidelity", "device"},
    {"hints", "decompression", "opened"},
    {"api"},
    {"rate"},
    {"demo", "bench"},
    {"cli"},
    {"__main__"},
]
"""Rooms of ``kvpack/``, lowest first; a room may import rooms of lower layers, and its own."""

ABOVE = {("checksum", "stages")}
ONLY_IN_CLI = {"typer", "rich"}
FILES = sorted((ROOT / "kvpack").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "kvpack").parts[0].removesuffix(".py")


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
        assert imported(path) == {"importlib", "typing"}  # starting takes no time
        return
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    own = room(path)
    assert own in height, f"{own} has no layer"
    for name in imported(path):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top in ONLY_IN_CLI:
            assert own == "cli", f"{name} belongs in cli"
        if top != "kvpack" or not target or target in {own, "__version__"}:
            continue
        assert height[target] < height[own] or (own, target) in ABOVE, f"{own} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_stages_do_not_know_of_each_others_kinds() -> None:
    """An entropy coder imports no quantizer, a quantizer no transform."""
    for path in (ROOT / "kvpack" / "stages" / "entropy").rglob("*.py"):
        assert not any(".quantizers" in n or ".transforms" in n for n in imported(path))
    for path in (ROOT / "kvpack" / "stages" / "quantizers").rglob("*.py"):
        assert not any(".entropy" in n or ".transforms" in n for n in imported(path))


def test_the_container_knows_no_stages_and_no_torch() -> None:
    for path in (ROOT / "kvpack" / "container").rglob("*.py"):
        names = imported(path)
        assert not any(n.startswith(("torch", "numpy", "kvpack.stages", "kvpack.codecs")) for n in names)
