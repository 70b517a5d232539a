"""The documentation's commands run, its links lead somewhere, and its names are the code's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvpack.cli.main import app
from kvpack.codecs import CODECS
from kvpack.demo import demo_text

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def block(language: str, containing: str) -> str:
    """The first fenced block of the README in that language with that text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)
    return next(text for text in blocks if containing in text)


def run(text: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readmes_commands_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((ROOT / "fixtures" / "llama-3-70b-config.json").read_bytes())
    (tmp_path / "doc.txt").write_text(demo_text()[:1600])
    out = run(block("sh", "kvpack capture"), tmp_path)
    assert "doc.safetensors.kvp ok (bit-exact)" in out
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "doc.safetensors").read_bytes()
    (tmp_path / "example.py").write_text(block("python", "api.compress"))
    run(f"{sys.executable} example.py", tmp_path)


def test_the_readme_shows_every_command() -> None:
    for command in app.registered_commands:
        assert f"kvpack {command.callback.__name__}" in README  # type: ignore[union-attr]


def test_the_results_table_has_every_codec() -> None:
    for name in CODECS:
        assert re.search(rf"^\| `{name}` \|", README, flags=re.M), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_docs_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|docs|fixtures|kvpack)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name
