"""The interface of kernels to the GPU engine: which tasks they code together, and the steps of a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from kvpack.cache import PartSpec
from kvpack.codecs.protocol import Codec
from kvpack.engine import Done, Task
from kvpack.gpu.runtime.host import Slot

Outcome = Done | Task
"""The result of a task, or the task itself if the CPU has to do it."""


class Kernels(Protocol):
    """Kernels for one kind of task, in one direction.

    A batch is staged (copied into pinned memory), started (sent and coded), collected (its results are requested, once
    their size is known) and finished (its results are yielded). Between these steps, nothing waits for the GPU except
    to learn a size.
    """

    batch_bytes: ClassVar[int]
    """The most bytes of blocks in a batch that has more than one block."""

    def key(self, task: Task) -> Hashable | None:
        """Return a key, or None if the kernels do not support the task. Tasks with equal keys can form a batch."""

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Return whether a task with the same key can join a batch that has room for it."""

    def stage(self, tasks: list[Any], slot: Slot) -> Any:
        """Begin to copy what the tasks need."""

    def start(self, staged: Any) -> Any:
        """Request all GPU work that can be requested at this step."""

    def collect(self, started: Any) -> Any:
        """Request the results."""

    def finish(self, collected: Any) -> Iterator[Outcome]:
        """Wait for the results and yield them."""


T = TypeVar("T")

MAX_KNOWN = 4096


class KnownParts(Generic[T]):
    """Remembers what ``find`` returns for a part and its codec, for all parts that differ only in their layer."""

    def __init__(self, find: Callable[[PartSpec, Codec], T]) -> None:
        """Use ``find``, which must not look at a part's layer or name."""
        self._find = find
        self._known: dict[Hashable, tuple[Codec, T]] = {}

    def __call__(self, part: PartSpec, codec: Codec) -> T:
        """Return what ``find`` returned for such a part."""
        tensor = part.tensor
        key = (id(codec), tensor.role, tensor.dtype, tensor.shape, tensor.origin, part.first, part.tokens, part.length)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = codec, self._find(part, codec)  # holding the codec keeps its id unique
        return found[1]
