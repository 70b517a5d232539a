"""What kernels are to the engine of a GPU: which tasks they take together, and the steps of a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from kvpack.cache import PartSpec
from kvpack.codecs.protocol import Codec
from kvpack.engine import Done, Task
from kvpack.gpu.runtime.host import Slot

Outcome = Done | Task
"""The result of a task, or the task itself where a CPU has to do it."""


class Kernels(Protocol):
    """Kernels for one kind of task, and one direction.

    A batch is staged (copied into pinned memory), started (sent and coded), collected (its results asked for, once
    their size is known) and finished (its results given). Nothing but a size is waited for in between.
    """

    batch_bytes: ClassVar[int]
    """Bytes of blocks that a batch has at most, if it has more than one."""

    def key(self, task: Task) -> Hashable | None:
        """Tasks of one key can be a batch; None says that these kernels do not take the task."""

    def joins(self, batch: Sequence[Task], task: Task) -> bool:
        """Whether a task of the same key can be the next of a batch that has room for it."""

    def stage(self, tasks: list[Any], slot: Slot) -> Any:
        """Begin to copy what the tasks need."""

    def start(self, staged: Any) -> Any:
        """Ask the GPU for everything that can be asked for now."""

    def collect(self, started: Any) -> Any:
        """Ask for the results."""

    def finish(self, collected: Any) -> Iterator[Outcome]:
        """Wait for the results and give them."""


T = TypeVar("T")

MAX_KNOWN = 4096


class KnownParts(Generic[T]):
    """What ``find`` says of a part and its codec, found once for parts that differ in their layer alone."""

    def __init__(self, find: Callable[[PartSpec, Codec], T]) -> None:
        """``find`` must not look at a part's layer or name."""
        self._find = find
        self._known: dict[Hashable, tuple[Codec, T]] = {}

    def __call__(self, part: PartSpec, codec: Codec) -> T:
        """Return what ``find`` said of such a part."""
        tensor = part.tensor
        key = (id(codec), tensor.role, tensor.dtype, tensor.shape, part.first, part.tokens, part.length)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = codec, self._find(part, codec)  # a codec that is held keeps its id
        return found[1]
