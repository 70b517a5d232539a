"""The documentation's commands run, its links lead somewhere, and its names are the code's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from prose import prose

from kvpack.cli.main import app
from kvpack.codecs.recipes import CODECS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


SLOW = r"kvpack (bench|calibrate|demo)\b|-D |--compare"
"""Commands of the README that the short run leaves out, with those that take what they have made."""


def blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page that can be run: languages and texts."""
    return re.findall(r"^```(sh|python)\n(.*?)^```", text, flags=re.M | re.S)


def as_one_script(text: str, leave_out: str) -> str:
    """All blocks of a page, one after another, as somebody types who follows it from top to bottom.

    What has been installed is not installed again, and the tests do not run themselves. Lines that match ``leave_out``
    are left out.
    """
    lines = []
    for language, block in blocks(text):
        if language == "python":
            lines.append(f"{shlex.quote(sys.executable)} - <<'END'\n{block}END")
            continue
        for line in block.replace("\\\n", " ").splitlines():
            parts = [
                part for part in line.split(" && ") if not re.match(r"\s*(pip|pytest|git|cd|python3? -m venv)\b", part)
            ]
            if parts and not (leave_out and re.search(leave_out, line)):
                lines.append(" && ".join(parts))
    return "\n".join(lines) + "\n"


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


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.long)], ids=["quick", "all"])
def test_the_readme_runs_from_top_to_bottom(tmp_path: Path, quick: bool) -> None:
    """Shell and Python in one folder, in their order, by copy and paste. A reader brings a text and a configuration."""
    (tmp_path / "config.json").write_bytes((ROOT / "fixtures" / "llama-3-70b-config.json").read_bytes())
    (tmp_path / "doc.txt").write_text(prose()[: 1600 if quick else 12_000])
    for name, part in (("some.txt", slice(0, 30_000)), ("others.txt", slice(30_000, 60_000))):
        (tmp_path / name).write_text(prose()[part])
    script = as_one_script(README, SLOW if quick else "")
    assert script.count("kvpack ") > 3
    assert "<<'END'" in script
    out = run(script, tmp_path)
    assert "(bit-exact)" in out
    for path in tmp_path.glob("back*.safetensors"):
        assert path.read_bytes() == (tmp_path / "doc.safetensors").read_bytes()


def test_the_example_of_contributing_runs(tmp_path: Path) -> None:
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    ((language, text),) = blocks((ROOT / "docs" / "CONTRIBUTING.md").read_text())
    assert language == "python"
    (tmp_path / "example.py").write_text(text)
    assert run(f"{sys.executable} example.py", tmp_path).endswith("bytes, and back, bit for bit\n")


def test_blocks_become_one_script() -> None:
    page = (
        "```sh\npip install x && kvpack a\npytest\nkvpack bench\n```\n\n```python\nprint(1)\n```\n```\nkvpack no\n```\n"
    )
    assert as_one_script(page, SLOW) == f"kvpack a\n{sys.executable} - <<'END'\nprint(1)\nEND\n"


def commands(page: Path) -> list[tuple[str, bool]]:
    """Command lines of kvpack that a page shows, and whether each is whole: in a block, not named in passing."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line.removeprefix("$ ") for line in lines if not line.startswith("    ")]
    whole = [part.strip() for line in lines for part in re.split(r" \| | && |;|#", line)]
    passing = [re.sub(r"\s+", " ", named) for named in re.findall(r"(?<!`)`(kvpack [^`]+)`(?!`)", text)]
    found = [(line, True) for line in whole] + [(line, False) for line in passing]
    return [(line, full) for line, full in found if re.match(r"(python3? -m )?kvpack -?\w", line)]


def problem(line: str, full: bool) -> str | None:
    """Why the command line does not parse; where it is not whole, nothing need be there that is missing.

    Errors are told by name: typer brings its own copy of click, or does not, by version.
    """
    group: Any = typer.main.get_command(app)
    line = re.sub(r"\b[NR]\b", "1", line.replace("$texts", "--text TEXT").replace(" ...", "").replace(" …", " PROFILE"))
    first, *rest = shlex.split(line.partition("kvpack ")[2])
    if first.startswith("-"):
        options = {option for param in group.params for option in param.opts}
        return None if first in options | {"--help"} else f"no option {first}"
    if first not in group.commands:
        return f"no command {first}"
    while hasattr(group.commands[first], "commands") and rest and not rest[0].startswith("-"):
        group, (first, *rest) = group.commands[first], rest
        if first not in group.commands:
            return f"no command {first}"
    if "--help" in rest or "--list-codecs" in rest:
        return None
    try:
        group.commands[first].make_context(first, rest).close()
    except Exception as error:
        lacking = type(error).__name__ in ("MissingParameter", "BadOptionUsage")
        return None if lacking and not full else repr(error)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_parses(page: Path) -> None:
    problems = {line: problem(line, full) for line, full in commands(page)}
    assert not {line: found for line, found in problems.items() if found}


def test_commands_that_do_not_parse_are_found() -> None:
    found = {line for page in PAGES for line, _ in commands(page)}
    assert len(found) > 30
    assert "kvpack inspect small.kvp" in found
    assert problem("kvpack inspect small.kvp", True) is None
    for wrong in (
        "kvpack compress x --no-such-option",
        "kvpack nonsense x",
        "kvpack --nonsense",
        "kvpack verify",
        "kvpack store pot",
    ):
        assert problem(wrong, True), wrong


def test_the_readme_shows_every_command() -> None:
    for command in app.registered_commands:
        assert f"kvpack {command.callback.__name__}" in README  # type: ignore[union-attr]


def rows(text: str, start: str = "# ") -> dict[str, list[str]]:
    """Rows of the first table of codecs after ``start``, by the codec's name."""
    text = text[text.index(start) :]
    table = text[text.index("| codec |") :].split("\n\n", maxsplit=1)[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in table]
    return {first: rest for first, *rest in cells}


def test_the_benchmarks_have_every_codec() -> None:
    assert list(rows(BENCHMARKS, "### All codecs, one document")) == list(CODECS)


def test_the_readmes_results_are_of_the_benchmarks() -> None:
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in BENCHMARKS.splitlines()]
    for name, figures in rows(README).items():
        assert any(line[0] == name and set(figures) <= set(line) for line in lines), name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_docs_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|docs|fixtures|kvpack)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name


def lines_without_code(page: Path) -> list[str]:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S).splitlines()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = [line.lstrip("#").strip().lower() for line in lines_without_code(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_headings_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text()):
        assert anchor in anchors(page.parent / target if target else page), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_render(page: Path) -> None:
    """Every table has a header, a line below it, and rows of as many cells. An empty line would break it in two."""
    cells = [len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0 for line in lines_without_code(page)]
    below = [bool(re.fullmatch(r"\|( ?:?-+:? ?\|)+", line)) for line in lines_without_code(page)]
    for i, count in enumerate(cells):
        if count and not (i and cells[i - 1]):
            assert below[i + 1], lines_without_code(page)[i]
        elif count:
            assert count == cells[i - 1], lines_without_code(page)[i]
