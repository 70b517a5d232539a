"""Read ``.kvp`` files: blocks as tasks for an engine, and tensors and windows for Python programs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvpack.cache import CacheSpec, PartSpec, WindowSpec
from kvpack.cache.metadata import parse_metadata
from kvpack.codecs.context import DecodeContext
from kvpack.codecs.model import LanguageModel, Replay
from kvpack.codecs.protocol import Codec, Need, Scope
from kvpack.codecs.registry import codec_from_json
from kvpack.codecs.replay import ReplayCodec
from kvpack.engine import CpuEngine, DecodeTask, Engine, InTurn, Room, Ticket, awaited
from kvpack.engine.memory import default_limit, require_memory
from kvpack.errors import CorruptError, FormatError, MismatchError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.input import InputFile
from kvpack.formats.records import preceded, token_ids
from kvpack.formats.safetensors import TensorFile, TensorSpec
from kvpack.formats.source import Capture, in_shape
from kvpack.jobs import replay
from kvpack.kvp import Container
from kvpack.kvp.layout import MAGIC
from kvpack.numerics.floats import Bits
from kvpack.profiles import Profile, profile_with

Wanted = Callable[[PartSpec], bool]
"""A function that says whether a part is wanted."""


def everything(_: PartSpec) -> bool:
    """Return True: all parts are wanted."""
    return True


def keys_and_values(part: PartSpec) -> bool:
    """Return whether the part belongs to a layer."""
    return part.tensor.layer is not None


class KvpFile:
    """A ``.kvp`` file. Any number of threads may read from it."""

    def __init__(
        self,
        container: Container,
        profile: Profile | None = None,
        name: str | None = None,
        before: NDArray[np.int32] | None = None,
        *,
        model: LanguageModel | None = None,
        approximate: bool = False,
    ) -> None:
        """Wrap an open container and rebuild the codecs from its header. Messages call the file ``name``.

        If the file begins at a later position of a text, ``before`` ``[origin]`` int32 are the token ids before it.
        Codecs that predict from token ids need them.

        ``model`` is for files whose codec runs the model. With ``approximate``, what it computes is taken even if it is
        not bit for bit what it was when the file was written; :attr:`replay` then tells which parts differ.

        Raises:
            FormatError, UnsupportedError: This kvpack cannot rebuild a codec.
            MismatchError: ``profile`` is not the one the file was made with.

        """
        self.container, self.profile, self.name, self.before = container, profile, name, before
        self.model, self._approximate = model, approximate
        self.memlimit = default_limit()
        """The most bytes of memory that decoding a block may take."""
        self.codecs: list[Codec] = [codec_from_json(document) for document in container.header.codecs]
        for entry in container.parts:
            if not self.codecs[entry.codec].takes(entry.spec.tensor):
                codec = self.codecs[entry.codec].name
                raise FormatError(f"{entry.spec.label}: the codec {codec!r} does not take {entry.spec.tensor.dtype}")
        if self.lossless and not all(self.codecs[entry.codec].exact(entry.spec) for entry in container.parts):
            raise FormatError("labelled lossless, but its codecs are not")
        needed = container.header.profile
        if needed and profile and profile.sha256 != needed["sha256"]:
            mine = _describe(profile.identity())
            raise MismatchError(f"was made with the profile {_describe(needed)}, not with {mine}")
        if needed and profile is None:
            self.profile = profile_with(needed["sha256"])
        self.spec: CacheSpec = container.cache
        self.tensors: Mapping[str, TensorSpec] = {entry.name: entry for entry in container.source.tensors}
        self.metadata: Mapping[str, str] = container.source.metadata
        self.origin = container.header.origin
        self._lock = threading.Lock()
        self._context: DecodeContext | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        profile: Profile | None = None,
        name: str | None = None,
        *,
        model: LanguageModel | None = None,
        approximate: bool = False,
        damaged: bool = False,
    ) -> KvpFile:
        """Open ``path``. Messages call it ``name`` if that is given.

        With ``damaged``, a damaged prologue or footer does not keep the file from being opened, if it can be made anew.
        The other arguments are the constructor's.
        """
        return cls.of(InputFile(path, name), profile, model=model, approximate=approximate, damaged=damaged)

    @classmethod
    def of(
        cls,
        file: InputFile,
        profile: Profile | None = None,
        *,
        model: LanguageModel | None = None,
        approximate: bool = False,
        damaged: bool = False,
    ) -> KvpFile:
        """Wrap a file that is open already. The arguments are those of :meth:`open`."""
        container = Container.of(file, damaged=damaged)
        with naming(file.name):
            return cls(container, profile, file.name, model=model, approximate=approximate)

    @property
    def needs_model(self) -> bool:
        """Return whether a codec of the file runs the model."""
        return any(Need.MODEL in codec.traits.needs for codec in self.codecs)

    @property
    def replay(self) -> Replay | None:
        """Return the cache as the model has computed it again, if that has happened."""
        return self._context.replay if self._context is not None else None

    @property
    def lossless(self) -> bool:
        """Return whether every tensor is restored bit for bit."""
        return self.container.header.lossless

    @property
    def by_tensor(self) -> bool:
        """Return whether every tensor can be decoded without the others."""
        return all(codec.traits.scope is Scope.TENSOR for codec in self.codecs)

    def context(self) -> DecodeContext:
        """Return what codecs are given. Token ids are decoded first, although the file stores them after the layers.

        Raises:
            MismatchError: The file begins at a later position of a text, and the tokens before it are not known.

        """
        with self._lock:
            if self._context is None:
                tokens: NDArray[np.int32] | None = None
                if any(Need.TOKENS in codec.traits.needs for codec in self.codecs):
                    if self.origin and (self.before is None or len(self.before) != self.origin):
                        raise MismatchError(self._alone())
                    tokens = preceded(token_ids(self), self.before)
                self._context = DecodeContext(self.profile, tokens, self.model, self._replayed(tokens))
            return self._context

    def _replayed(self, tokens: NDArray[np.int32] | None) -> Replay | None:
        """Let the model compute the cache again, if a codec of the file needs it."""
        codec = next((codec for codec in self.codecs if isinstance(codec, ReplayCodec)), None)
        if codec is None:
            return None
        if self.model is None:
            name = parse_metadata(self.metadata).model_name
            raise MismatchError(f"needs the model that made the cache ({name}): give it with --model")
        return replay.run(
            self.spec, self.metadata, tokens, self.model, sample=codec.sample, approximate=self._approximate
        )[0]

    def lacks(self, codec: Codec) -> str | None:
        """Return what decoding by a codec of this file lacks here, ``a profile`` or ``a model``, or None."""
        if Need.PROFILE in codec.traits.needs and self.profile is None:
            return "a profile"
        return "a model" if Need.MODEL in codec.traits.needs and self.model is None else None

    def require_whole(self) -> None:
        """Check that the file begins where its text does.

        Raises:
            MismatchError: It begins at a later position, so its rows alone are no cache.

        """
        if self.origin:
            raise MismatchError(self._alone())

    def _alone(self) -> str:
        where = f"begins at token {self.origin} of a text and cannot be decompressed without what comes before"
        return f"{where}: kvpack store get gives the whole prefix"

    def tasks(
        self, wanted: Wanted = everything, room: Callable[[WindowSpec], Room] | None = None, job: int = 0
    ) -> Iterator[DecodeTask]:
        """Yield a task for every block that has a part for which ``wanted`` is true, in the order of the file.

        ``room`` gives the memory into which a block is decoded. Without it, each result has arrays of its own.

        Raises:
            CorruptError: Parts that are coded together have different codecs.
            MismatchError: A block needs a profile, and there is none.

        """
        for number, window in enumerate(self.container.windows):
            if any(map(wanted, window.parts)):
                for b, block in enumerate(self._blocks(number)):
                    if wanted is everything or any(map(wanted, window.parts[block])):
                        yield self._task(Ticket(job, number, b), block, room)

    def _blocks(self, number: int) -> Iterator[slice]:
        """Yield each run of a window's parts that is decoded together."""
        window = self.container.windows[number]
        codecs = {entry.codec for entry in self.container.entries(number)}
        together = any(self.codecs[codec].traits.scope is not Scope.TENSOR for codec in codecs)
        if not window.layered or not together:
            yield from (slice(at, at + 1) for at in range(len(window.parts)))
        elif len(codecs) > 1:
            label = window.parts[0].label
            raise CorruptError(f"corrupt: {label} is coded with other layers that have other codecs")
        else:
            yield from self.codecs[codecs.pop()].blocks(window)

    def _task(self, ticket: Ticket, which: slice, room: Callable[[WindowSpec], Room] | None) -> DecodeTask:
        """Return the task of a block of the ticket's window, once it is known that everything is there to decode it."""
        spec = self.container.windows[ticket.window].take(which)
        codec = self.codecs[self.container.entries(ticket.window)[which][0].codec]
        require_memory(spec, codec, self.memlimit)
        context = DecodeContext(tokens=self._context.tokens if self._context else None, model=self.model)
        if spec.layered and codec.traits.needs:
            if Need.PROFILE in codec.traits.needs and self.profile is None:
                needed = self.container.header.profile
                named = f"needs the profile {_describe(needed)}: give it with -D" if needed else "no profile"
                raise MismatchError(named)
            context = self.context()
        stored = self.container.stored(ticket.window, which)
        return DecodeTask(ticket, spec, stored, codec, context, room(spec) if room else None)

    def read(self, name: str, rows: slice | None = None) -> Bits:
        """Decode a tensor, or for keys and values only a range of rows, without reading other windows.

        If the codec codes all layers together, whole windows are decoded. :meth:`windows` then gives all tensors at
        once.

        Raises:
            KeyError: The file has no such tensor.
            CorruptError: The file is damaged.
            MismatchError: A calibration profile is needed, and there is none.

        """
        entry = self.tensors[name]
        if layer_of(entry) is None or not entry.elements:
            bits = in_shape(self._other(name), entry)
            return bits if rows is None or layer_of(entry) is not None else bits[..., rows]
        start, stop, _ = (rows or slice(None)).indices(entry.shape[1])
        out: Bits = np.zeros((entry.shape[0], max(stop - start, 0), entry.shape[2]), f"<u{entry.itemsize}")

        def wanted(part: PartSpec) -> bool:
            return part.tensor.name == name and part.first < stop and start < part.first + part.tokens

        for part, bits in self._decoded(wanted):
            first, last = max(part.first, start), min(part.first + part.tokens, stop)
            out[:, first - start : last - start] = bits[:, first - part.first : last - part.first]
        return out

    def _other(self, name: str) -> Bits:
        """Decode a tensor that is neither keys nor values, or has no elements, without looking at the others."""
        at = self._others.get(name)
        if at is None:
            return np.zeros(0, f"<u{self.tensors[name].itemsize}")
        number = len(self.container.windows) - 1
        with naming(self.name):
            task = self._task(Ticket(0, number, at), slice(at, at + 1), None)
            bits = InTurn(CpuEngine(1).run([task])).take(task.ticket).arrays[0]
        return np.require(bits, requirements=["C", "W"])

    @cached_property
    def _others(self) -> dict[str, int]:
        """Where in the last window each tensor is that is neither keys nor values."""
        return {tensor.name: at for at, tensor in enumerate(self.spec.others)}

    def _decoded(self, wanted: Wanted) -> Iterator[tuple[PartSpec, Bits]]:
        """Yield the wanted parts, decoded, in the order of the file."""
        with naming(self.name):
            tasks = list(self.tasks(wanted))
            with awaited(CpuEngine().run(tasks)) as run:
                results = InTurn(run)
                for task in tasks:
                    every = zip(task.block.parts, results.take(task.ticket).arrays, strict=True)
                    yield from ((part, bits) for part, bits in every if wanted(part))

    def windows(self, engine: Engine | None = None) -> Iterator[tuple[int, Mapping[str, Bits]]]:
        """Yield keys and values window by window: the first row, and the window's rows ``[H, t, D]`` by tensor name.

        A tensor that ends before the window is left out. The errors are those of :meth:`read`.
        """
        with awaited((engine or CpuEngine()).run(self.tasks(keys_and_values))) as run:
            results = InTurn(run)
            for number, window in enumerate(self.container.windows):
                if window.layered:
                    arrays: list[Bits] = []
                    with naming(self.name):
                        for b, _ in enumerate(self._blocks(number)):
                            arrays += results.take(Ticket(0, number, b)).arrays
                    names = (part.tensor.name for part in window.parts)
                    yield window.parts[0].first, dict(zip(names, arrays, strict=True))


def _describe(identity: Mapping[str, str]) -> str:
    return f"{identity['name']} (SHA-256 {identity['sha256'][:12]}...)"


def open_cache(
    path: Path, profile: Profile | None = None, model: LanguageModel | None = None, name: str | None = None
) -> Capture | KvpFile:
    """Open a capture or a ``.kvp`` file, which messages call ``name``. The first bytes tell which one it is.

    Raises:
        FormatError: The file is neither a capture nor a ``.kvp`` file, or it is damaged.
        MismatchError: The ``.kvp`` file needs another profile.

    """
    file = InputFile(path, name)
    if bytes(file.read(0, min(4, file.size))) == MAGIC[:4]:
        return KvpFile.of(file, profile, model=model)
    return Capture(TensorFile.of(file.name, file))
