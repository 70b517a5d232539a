"""``import kvpack`` as a program sees it: it takes no time, and what it offers has types."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

import kvpack
from kvpack.errors import FormatError
from kvpack.jobs import opened


def test_importing_kvpack_imports_nothing_more() -> None:
    code = (
        "import sys, typing, __future__\n"
        "before = set(sys.modules)\n"
        "import kvpack\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['kvpack']\n"


def test_open_is_typed_as_what_it_calls() -> None:
    ours, theirs = inspect.signature(kvpack.open), inspect.signature(opened.open_file)
    assert ours == theirs
    assert ours.return_annotation == "Opened"
    assert "Any" not in str(ours)


@pytest.mark.long
def test_a_type_checker_knows_what_open_gives(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text('import kvpack\nreveal_type(kvpack.open("x"))\nkvpack.open(3)\n')
    root = Path(kvpack.__file__).parent.parent
    options = ["--config-file", str(root / "pyproject.toml"), "--cache-dir", str(root / ".mypy_cache")]
    out, _, _ = api.run([*options, "--follow-imports=silent", str(program)])
    assert 'Revealed type is "kvpack.jobs.opened.Opened"' in out
    assert 'Argument 1 to "open" has incompatible type "int"' in out


def test_open_opens() -> None:
    assert kvpack.open(SMALL).read("layers.0.keys").shape == (3, 160, 64)
    with pytest.raises(FormatError):
        kvpack.open(__file__)
