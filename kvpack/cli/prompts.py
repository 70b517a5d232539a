"""The prompt that ``kvpack store get`` looks for: a capture, a text or token ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.cli import common
from kvpack.errors import UsageError, naming
from kvpack.formats.input import read_file

if TYPE_CHECKING:
    from kvpack.capture import Model
    from kvpack.store import Prompt


def prompt_of(path: Path | None, text: Path | None, tokens: str | None, model: str | None, any_way: bool) -> Prompt:
    """Return the prompt of the one that is given: a capture or .kvp file, a text file, or token ids.

    With ``any_way``, caches are found however they were made.
    """
    from kvpack.jobs import KvpFile, open_cache
    from kvpack.store import Prompt

    if path is not None:
        with common.readable(path) as source, naming(str(path)):
            opened = open_cache(source, name=str(path))
            if isinstance(opened, KvpFile):
                opened.require_whole()
            return Prompt.of_cache(opened, opened.metadata, any_way=any_way)
    if text is not None:
        from kvpack.cli.capture import read_text

        content, loaded = read_text(text), named_model(model or "embedded")
        ids: list[int] = loaded.tokenizer(content).input_ids
        return Prompt.of_tokens(ids, weights=loaded.weights_sha256, any_way=any_way)
    weights = named_model(model).weights_sha256 if model else None
    return Prompt.of_tokens(parse_ids(tokens or ""), weights=weights, any_way=any_way)


def named_model(name: str) -> Model:
    """Load the model that an option names."""
    from kvpack.capture import load_model

    return load_model(None if name == "embedded" else name)


def parse_ids(given: str) -> list[int]:
    """Return the token ids in a list or in a file of such a list: whole numbers between commas or spaces.

    Raises:
        UsageError: It is neither.

    """
    listed = given
    if not words_in(given) and _is_file(given):
        listed = read_file(Path(given)).decode(errors="replace").strip().strip("[]")
    words = words_in(listed)
    if not words or max(map(int, words)) >= 1 << 31:
        raise UsageError(f"--tokens takes token ids like 1,2,3, or a file of them, not {given!r}")
    return [int(word) for word in words]


def _is_file(given: str) -> bool:
    try:
        return Path(given).is_file()
    except OSError:  # It is too long for a name.
        return False


def words_in(text: str) -> list[str]:
    """Return the numbers in a list, or nothing if there is anything else in it."""
    words = text.replace(",", " ").split()
    return words if all(word.isascii() and word.isdecimal() and len(word) < 11 for word in words) else []
