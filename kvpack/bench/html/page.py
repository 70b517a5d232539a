"""One self-contained page: its parts, and how text and data go into it without becoming markup or code.

Everything that comes from files or from the command line is escaped. Beside that, the page's own policy
(Content-Security-Policy) lets the browser run the page's two scripts, known by their hashes, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

import kvpack
from kvpack.bench.html.library import javascript
from kvpack.cache.untrusted import printable


@dataclass
class Page:
    """A page with a title, an introduction, sections, and the data of its charts."""

    title: str
    intro: str
    data: dict[str, Any] = field(default_factory=dict)
    sections: list[str] = field(default_factory=list)

    def section(self, name: str, title: str, *parts: str) -> None:
        """Add a section under a heading, which a link can name; ``parts`` are HTML."""
        self.sections.append(f'<section id="{name}"><h2>{text(title)}</h2>{"".join(parts)}</section>')

    def render(self) -> bytes:
        """Return the page as UTF-8."""
        here = files("kvpack.bench.html")
        style = (here / "page.css").read_text()
        scripts = [javascript(), "".join((here / name).read_text() for name in ("charts.js", "page.js"))]
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
        policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
        tags = "".join(f"<script>{script}</script>\n" for script in scripts)
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="kvpack {text(kvpack.__version__)}">
<title>{text(self.title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{text(self.title)}</h1>{self.intro}</header>
<main>
{"".join(self.sections)}
</main>
<script type="application/json" id="data">{embedded(self.data)}</script>
{tags}</body>
</html>
""".encode(errors="backslashreplace")


def text(value: object) -> str:
    """Return text that can stand in HTML or in a quoted attribute, with control characters escaped as in a terminal."""
    return escape(printable(str(value)))


def embedded(document: Any) -> str:
    """Return a document as JSON that can stand in a script element: it has no ``<``, ``>`` or ``&``."""
    raw = json.dumps(document, separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        raw = raw.replace(letter, f"\\u{ord(letter):04x}")
    return raw


def paragraph(words: str, kind: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p{_class(kind)}>{text(words)}</p>"


def chart(name: str, title: str, words: str) -> str:
    """Return the place of a chart that the page's script draws, under a title and a sentence on how to read it."""
    return (
        f"<figure><figcaption><strong>{text(title)}</strong> {text(words)}</figcaption>"
        f'<div class="chart" data-chart="{text(name)}"></div></figure>'
    )


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, names: Sequence[str] = (), left: int = 1
) -> str:
    """Return a table whose first ``left`` columns hold words, and the others figures. ``names`` are the rows' ids."""
    heads = "".join(f'<th scope="col"{_class("" if i < left else "n")}>{text(c)}</th>' for i, c in enumerate(columns))
    lines = []
    for i, row in enumerate(rows):
        first, *others = row
        cells = "".join(f"<td{_class('' if j + 1 < left else 'n')}>{text(cell)}</td>" for j, cell in enumerate(others))
        mark = f' id="{text(names[i])}"' if names else ""
        lines.append(f'<tr{mark}><th scope="row">{text(first)}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(caption)}"><table><caption>{text(caption)}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def tiles(facts: Mapping[str, str]) -> str:
    """Return the few figures that say most, large."""
    return (
        '<dl class="tiles">'
        + "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts.items())
        + "</dl>"
    )


def facts(values: Mapping[str, object]) -> str:
    """Return a list of names with what they stand for; those without a value are left out."""
    return (
        '<dl class="facts">'
        + "".join(
            f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items() if value not in (None, "")
        )
        + "</dl>"
    )


def commands(lines: Iterable[str]) -> str:
    """Return command lines as they are typed."""
    return f"<pre>{text_lines(lines)}</pre>"


def text_lines(lines: Iterable[str]) -> str:
    """Return lines of text for a ``pre`` element."""
    return "\n".join(text(line) for line in lines)


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
