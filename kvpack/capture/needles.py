"""Plants needles: facts at several depths of a text, which a model can recite if its cache is intact."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from kvpack.capture.model import Model
from kvpack.errors import UsageError

NAMES = (
    *("Beatrix", "Osvaldo", "Tanaka", "Ingrid", "Mbeki", "Zelda", "Fyodor", "Paloma"),
    *("Quentin", "Rosalind", "Hamish", "Leila", "Dmitri", "Consuelo", "Winifred", "Akira"),
)
SNAP = 64
"""Number of tokens before a needle's nominal place in which a line end is looked for; the needle follows it."""


@dataclass(frozen=True)
class Needle:
    """A planted fact, whose text is question + answer + ".".

    ``position`` is the index of its first token in the prompt, and ``tokens`` are its token ids there.
    """

    question: str
    answer: str
    position: int
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the needle's entry in a capture's metadata."""
        return {"question": self.question, "answer": self.answer, "position": self.position}


def facts(count: int) -> list[tuple[str, str]]:
    """Return ``count`` questions with five-digit answers, the same on every call.

    Raises:
        UsageError: ``count`` is larger than the number of names.

    """
    if count > len(NAMES):
        raise UsageError(f"--needles is at most {len(NAMES)}")
    source = random.Random(0)
    return [(f"The number of {name} is {name}-", str(source.randrange(10000, 100000))) for name in NAMES[:count]]


def plant(model: Model, ids: list[int], count: int, max_tokens: int | None) -> tuple[list[int], list[Needle]]:
    """Return a prompt of at most ``max_tokens`` tokens with ``count`` facts planted evenly, and the facts.

    ``ids`` are the token ids of the text.

    Raises:
        UsageError: The facts take more tokens than the text that remains.

    """
    if not count:
        return ids[:max_tokens], []
    pieces = [(question, answer, tuple(encode(model, f"\n{question}{answer}.\n"))) for question, answer in facts(count)]
    room = sum(len(tokens) for _, _, tokens in pieces)
    body = ids if max_tokens is None else ids[: max(max_tokens - room, 0)]
    if len(body) < room:
        raise UsageError(f"{count} needles take {room} tokens: too many for a text of {len(ids)}")
    prompt: list[int] = []
    needles = []
    at = 0
    for i, (question, answer, tokens) in enumerate(pieces):
        place = _line_end(model, body, len(body) * (2 * i + 1) // (2 * count), at)
        prompt += body[at:place]
        needles.append(Needle(question, answer, len(prompt), tokens))
        prompt += tokens
        at = place
    return prompt + body[at:], needles


def encode(model: Model, text: str) -> list[int]:
    """Return the token ids of a piece of text, without special tokens."""
    ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _line_end(model: Model, ids: list[int], place: int, least: int) -> int:
    """Return the nearest position at or before ``place`` that follows a token with a line end, or else ``place``."""
    for at in range(place, max(place - SNAP, least), -1):
        if "\n" in model.tokenizer.decode(ids[at - 1 : at]):
            return at
    return place
