"""English prose of any length that every CPython contains: chapters of its language reference."""

from __future__ import annotations

TOPICS = ("typesmapping", "objects", "class", "exceptions", "naming", "types")


def prose() -> str:
    """Return about 67,000 characters of prose."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in TOPICS)
