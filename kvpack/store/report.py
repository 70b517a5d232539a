"""What a store holds: its trie in numbers, the bytes that sharing saves, and every stored text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvpack.cache.metadata import parse_metadata
from kvpack.errors import KvpackError, MismatchError
from kvpack.store.keys import Ids, is_name
from kvpack.store.objects import Entry, open_object
from kvpack.store.place import OBJECTS, Store

Bits = Callable[[Sequence[int]], float]
"""A function that gives the bits of a text's tokens under a model, each predicted from those before it."""


@dataclass(frozen=True)
class Leaf:
    """A stored text: the last object of its chain, and the chain's length in tokens, objects and bytes.

    ``used`` is the time of its last use in seconds since 1970. ``made`` is how its last tokens were made.
    """

    name: str
    kind: str
    codec: str
    model: str | None
    tokens: int
    objects: int
    bytes: int
    made: str
    used: float


@dataclass(frozen=True)
class Branch:
    """A prefix that several texts share: the object after which they part, and how many objects follow it.

    ``bits`` is -log2 of the prefix's probability under a model, its first token left out, or None without a model.
    """

    name: str
    kind: str
    tokens: int
    followers: int
    bits: float | None = None


@dataclass(frozen=True)
class StoreReport:
    """A store in numbers.

    ``depth`` is the most objects in a chain and ``longest`` the most tokens. ``bytes`` is the size of all objects, and
    ``saved`` the bytes that they would take besides if no two texts shared any: each leaf with a chain of its own.
    ``unreadable`` counts objects that are damaged or cannot be reached; ``kvpack store verify`` names them.
    """

    kinds: int
    objects: int
    leaves: list[Leaf]
    branches: list[Branch]
    depth: int
    longest: int
    tokens: int
    bytes: int
    saved: int
    unreadable: int


@dataclass(eq=False)
class _Node:
    entry: Entry
    before: _Node | None
    followers: list[_Node] = field(default_factory=list)

    def chain(self) -> Iterator[_Node]:
        """Yield the node and all before it."""
        node: _Node | None = self
        while node is not None:
            yield node
            node = node.before

    def text(self) -> Ids:
        return np.concatenate([node.entry.tokens for node in self.chain()][::-1])


def report(store: Store, bits: Bits | None = None, weights: str | None = None) -> StoreReport:
    """Walk through the whole store. Objects are proven but their checksums are not verified.

    With ``bits``, the probability of every shared prefix is computed, by the model whose weights have the SHA-256
    ``weights``.

    Raises:
        MismatchError: The store shares prefixes of another model than that.

    """
    with store.locked():
        nodes, unreadable = _nodes(store)
        leaves = [_leaf(node) for node in nodes if not node.followers]
    branching = [node for node in nodes if len(node.followers) > 1]
    size = sum(node.entry.size for node in nodes)
    return StoreReport(
        kinds=len({node.entry.kind for node in nodes}),
        objects=len(nodes),
        leaves=sorted(leaves, key=lambda leaf: (leaf.kind, -leaf.used, leaf.name)),
        branches=[_branch(node, bits, weights) for node in branching],
        depth=max((leaf.objects for leaf in leaves), default=0),
        longest=max((leaf.tokens for leaf in leaves), default=0),
        tokens=sum(len(node.entry.tokens) for node in nodes),
        bytes=size,
        saved=sum(leaf.bytes for leaf in leaves) - size,
        unreadable=unreadable,
    )


def _nodes(store: Store) -> tuple[list[_Node], int]:
    """Return the nodes of the trie, parents first, and the number of objects that are no part of it."""
    folders = {path.name for path in (store.path / OBJECTS).iterdir() if is_name(path.name)}
    total = sum(len(store.children(name)) for name in folders)
    nodes: list[_Node] = []
    waiting: list[tuple[str, _Node | None]] = [(name, None) for name, _ in store.kinds()]
    while waiting:
        parent, before = waiting.pop()
        for name in sorted(store.children(parent)):
            try:
                entry = open_object(store, store.object(parent, name))
            except (KvpackError, OSError):
                continue
            node = _Node(entry, before)
            if before is not None:
                before.followers.append(node)
            nodes.append(node)
            waiting.append((name, node))
    return nodes, total - len(nodes)


def _leaf(node: _Node) -> Leaf:
    chain, entry = list(node.chain()), node.entry
    return Leaf(
        name=entry.name,
        kind=entry.kind,
        codec=entry.codec,
        model=parse_metadata(entry.source.metadata).model_name,
        tokens=sum(len(one.entry.tokens) for one in chain),
        objects=len(chain),
        bytes=sum(one.entry.size for one in chain),
        made=entry.made,
        used=entry.path.stat().st_mtime,
    )


def _branch(node: _Node, bits: Bits | None, weights: str | None) -> Branch:
    entry, text = node.entry, node.text()
    found = None
    if bits is not None:
        own = parse_metadata(entry.source.metadata).weights_sha256
        if own != weights:
            raise MismatchError(f"{entry.path}: a cache of other weights ({str(own)[:12]}) than the model's")
        found = bits(text.tolist()) if len(text) > 1 else 0.0
    return Branch(entry.name, entry.kind, len(text), len(node.followers), found)


def to_json(found: StoreReport) -> dict[str, Any]:
    """Return a report in JSON types."""
    return {
        **{name: value for name, value in vars(found).items() if name not in ("leaves", "branches")},
        "leaves": [vars(leaf) for leaf in found.leaves],
        "branches": [vars(branch) for branch in found.branches],
    }
