"""The demo's table, and the picture of it in the README."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpack.bench.demo import SHOWN

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "kvpack-demo" / "results.json"
"""What the README's first command has left, where it was run as the README says (as .ci/run does)."""


WIDTH = 12.2
"""Width of a character in the pictures that rich draws."""


def drawn() -> dict[str, list[str]]:
    """Rows of the README's picture by codec: what is kept, MB, times smaller, KL plain, KL repeat, facts."""
    picture = (ROOT / "docs" / "demo.svg").read_text()
    lines: dict[str, list[tuple[float, str]]] = {}
    for attributes, text in re.findall(r"<text([^>]*)>([^<]*)</text>", picture):
        x, y = (re.search(rf' {name}="([0-9.]+)"', attributes) for name in "xy")
        if x and y:
            lines.setdefault(y[1], []).append((float(x[1]), html.unescape(text)))
    rows = [laid_out(parts) for parts in lines.values()]
    cells = [re.split(r"  +", row) for row in rows]
    return {first: rest for first, *rest in cells if first in {*SHOWN, "none"}}


def laid_out(parts: list[tuple[float, str]]) -> str:
    """A line of the picture, whose texts stand at multiples of :data:`WIDTH`."""
    line = ""
    for x, text in sorted(parts):
        line = line.ljust(round(x / WIDTH)) + text.replace("\xa0", " ")
    return line.strip()


def compared(rows: list[dict[str, Any]]) -> None:
    """Hold results against the picture. Sizes depend on the last bits of the model, KL and facts on a little more."""
    picture = drawn()
    assert [*picture] == ["none", *(row["codec"] for row in rows)]
    for row in rows:
        keeps, size, smaller, plain, repeat, facts = picture[row["codec"]]
        assert keeps == row["keeps"]
        assert float(size) == pytest.approx(row["size"] / 1e6, rel=0.03, abs=0.001)
        assert float(smaller.removesuffix(" x").replace(",", "")) == pytest.approx(row["ratio"], rel=0.03, abs=0.06)
        assert float(plain) == pytest.approx(row["kl_plain"], rel=0.3, abs=0.004)
        assert float(repeat) == pytest.approx(row["kl_repeat"], rel=0.3, abs=0.006)
        found, _, planted = facts.split()
        assert int(planted) == row["needles_planted"]
        assert abs(int(found) - row["needles"]) <= 2


@pytest.mark.skipif(not RESULTS.exists(), reason="the README's first command has not been run here")
def test_the_picture_is_what_the_readmes_first_command_prints() -> None:
    compared(json.loads(RESULTS.read_text())["codecs"])


@pytest.mark.long
def test_the_picture_is_what_the_demo_prints(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("demo", "-o", tmp_path / "demo", "--json", "--svg", tmp_path / "table.svg")
    assert done.code == 0, done.err
    compared(json.loads(done.out)["codecs"])
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert left == {"capture.safetensors", "lossless.kvp", "fisher-5.kvp", "results.json"}
