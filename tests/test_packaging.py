"""What ``pip install kvpack`` gives: the wheel of a built source distribution, used with nothing of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

import kvpack

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAID_OUT = ("kvpack", "pyproject.toml", "README.md", "LICENSE")


def test_the_version_is_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert f"## {kvpack.__version__}" in (ROOT / "docs" / "CHANGELOG.md").read_text()
    others = [
        path
        for path in [ROOT / "pyproject.toml", *(ROOT / "kvpack").rglob("*.py")]
        if f'"{kvpack.__version__}"' in path.read_text()
    ]
    assert others == [ROOT / "kvpack" / "__init__.py"]


def test_every_extra_that_a_message_names_is_there() -> None:
    extras = PROJECT["optional-dependencies"]
    named = {
        part
        for path in [*(ROOT / "kvpack").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for found in path.read_text().split("kvpack[")[1:]
        for part in found.split("]")[0].split(",")
    }
    assert named
    assert named <= set(extras)
    assert set(extras["all"][0].removeprefix("kvpack[").rstrip("]").split(",")) == {"capture", "bench", "plot", "html"}


def run(command: list[Any], folder: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env={**kept, **environment}
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built of the source distribution, in a copy of the repository without tests and docs."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in LAID_OUT:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    venv.create(folder / "builder", with_pip=True)
    python = folder / "builder" / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", "build"], folder)
    run([python, "-m", "build", "--outdir", folder / "dist", source], folder)
    (found,) = (folder / "dist").glob("*.whl")
    assert len(list((folder / "dist").glob("*.tar.gz"))) == 1
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment with the wheel, whose dependencies are those of this environment.

    They are found by a path behind the environment's own. What a ``.pth`` file there says is not read, and so an
    editable installation of kvpack is not found.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    run([folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run([folder / "bin" / "python", "-c", "import kvpack; print(kvpack.__file__)"], folder)
    assert Path(where.strip()).is_relative_to(packages)
    return folder / "bin"


@pytest.mark.long
def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kvpack").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == here
    assert {Path(name).suffix for name in names} >= {".py", ".cu", ".cuh", ".typed"}
    assert f"Version: {kvpack.__version__}" in text
    assert "License-File: LICENSE" in text
    for classifier in PROJECT["classifiers"]:
        assert f"Classifier: {classifier}" in text


@pytest.mark.long
def test_the_wheel_works_with_nothing_of_the_repository(installed: Path, tmp_path: Path) -> None:
    shutil.copy(SMALL, tmp_path / "doc.safetensors")
    program = installed / "kvpack"
    assert run([program, "--version"], tmp_path) == f"kvpack {kvpack.__version__}\n"
    run([program, "compress", "doc.safetensors"], tmp_path)
    run([program, "compress", "doc.safetensors", "-c", "local-4", "-o", "small.kvp"], tmp_path)
    run([program, "decompress", "doc.safetensors.kvp", "-o", "back.safetensors"], tmp_path)
    assert (tmp_path / "back.safetensors").read_bytes() == SMALL.read_bytes()
    assert "bit-exact: no" in run([program, "verify", "doc.safetensors", "small.kvp"], tmp_path)
    assert "where the bytes went" in run([program, "inspect", "small.kvp"], tmp_path)
    assert "lossless" in run([program, "compress", "--list-codecs"], tmp_path)
    script = "import kvpack; print(sorted(kvpack.open('small.kvp').to_tensors())[0])"
    assert "keys" in run([installed / "python", "-c", script], tmp_path)


@pytest.mark.long
def test_the_demo_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    assert "lossless" in run([installed / "kvpack", "demo"], tmp_path, COLUMNS="120")
