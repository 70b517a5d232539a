"""Writes the golden files of the format's current version. Run by hand, only when the format changes on purpose.

    python tests/make_goldens.py

Goldens are ``fixtures/goldens/{version}/{codec}.kvp`` with the SHA-256 of the capture they decode to, for exact
codecs. Frozen with format 1.0; while it is 0.x, a change is told in the version history of ``docs/format.md``.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from kvpack import api
from kvpack.archive import Archive
from kvpack.codecs import CODECS
from kvpack.container.layout import VERSION

FIXTURES = Path(__file__).parent.parent / "fixtures"
CAPTURE = FIXTURES / "smollm2-160.safetensors"
FOLDER = FIXTURES / "goldens" / ".".join(map(str, VERSION))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, codec in CODECS.items():
        path = FOLDER / f"{name}.kvp"
        with path.open("wb") as sink:
            api.compress(CAPTURE, sink, codec)
        if codec.lossless:
            back = io.BytesIO()
            api.decompress(Archive.open(path), back)
            path.with_suffix(".sha256").write_text(hashlib.sha256(back.getvalue()).hexdigest() + "\n")


if __name__ == "__main__":
    main()
