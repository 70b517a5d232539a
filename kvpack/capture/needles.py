"""Needles: facts planted in a text at several depths, which a model with a sound cache can recite."""

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
"""A needle is put behind a line's end that lies up to so many tokens before its place."""


@dataclass(frozen=True)
class Needle:
    """A fact's question and answer (the fact is question + answer + "."), and where it was planted.

    ``position`` is the index of its first token in the prompt, ``tokens`` its token ids there.
    """

    question: str
    answer: str
    position: int
    tokens: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """What a capture's metadata says of it."""
        return {"question": self.question, "answer": self.answer, "position": self.position}


def facts(count: int) -> list[tuple[str, str]]:
    """``count`` questions and five-digit answers, always the same.

    Raises:
        UsageError: more than there are names for.

    """
    if count > len(NAMES):
        raise UsageError(f"--needles is at most {len(NAMES)}")
    source = random.Random(0)
    return [(f"The number of {name} is {name}-", str(source.randrange(10000, 100000))) for name in NAMES[:count]]


def plant(model: Model, ids: list[int], count: int, max_tokens: int | None) -> tuple[list[int], list[Needle]]:
    """A prompt of at most ``max_tokens`` tokens of the text, ``count`` facts planted evenly among them.

    Raises:
        UsageError: the facts leave no room for text.

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
    """Token ids of a piece of text, nothing added."""
    ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
    return ids


def _line_end(model: Model, ids: list[int], place: int, least: int) -> int:
    """The nearest place at or before ``place`` that follows a token with a line's end."""
    for at in range(place, max(place - SNAP, least), -1):
        if "\n" in model.tokenizer.decode(ids[at - 1 : at]):
            return at
    return place
