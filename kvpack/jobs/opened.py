"""Files for programs: ``kvpack.open(path)`` gives tensors, on a GPU if wanted, and the cache that a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.cache import PartSpec, WindowSpec
from kvpack.engine import CpuEngine, Engine, Room
from kvpack.errors import FormatError, KvpackError, UsageError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorSpec
from kvpack.formats.source import Capture
from kvpack.gpu.runtime.host import AUTO_BYTES, find_gpu
from kvpack.jobs.reader import KvpFile, keys_and_values, open_cache
from kvpack.numerics.floats import Bits, to_torch
from kvpack.profiles import Profile

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher


class Opened:
    """A capture or a ``.kvp`` file."""

    def __init__(self, source: Capture | KvpFile) -> None:
        """Over an open one."""
        self.source = source
        self.tensors: Mapping[str, TensorSpec] = source.tensors
        self.metadata: Mapping[str, str] = source.metadata

    def read(self, name: str) -> Bits:
        """A tensor's bit patterns in its shape, unsigned integers.

        Raises:
            KeyError: the file has no such tensor.
            CorruptError: the file is damaged.

        """
        return self.source.read(name)

    def to_tensors(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Keys and values of all layers by name, ``[H, T, D]`` in their own dtype, on ``device`` (``cpu``, ``cuda:1``).

        A ``.kvp`` file is decoded on a GPU by the codecs that have kernels, and then does not pass through main memory
        decoded; what they do not take is decoded by the CPU, and sent.

        Raises:
            UsageError: there is no such GPU.
            CorruptError: the file is damaged.
            MismatchError: it needs a calibration profile.

        """
        if device == "cpu":
            return self.tensors_by(CpuEngine(), "cpu")
        gpu, reason = find_gpu(device, AUTO_BYTES)
        if gpu is None:
            raise UsageError(f"no GPU for {device!r}: {reason or 'asked for the CPU'}")
        return self.tensors_on(gpu)

    def tensors_on(self, gpu: Launcher) -> dict[str, torch.Tensor]:
        """:meth:`to_tensors` for a GPU that was found."""
        from kvpack.gpu.engine import GpuEngine

        return self.tensors_by(GpuEngine(gpu), gpu.device)

    def tensors_by(self, engine: Engine, device: str) -> dict[str, torch.Tensor]:
        """:meth:`to_tensors` by an engine of the caller's, which is that of ``device``."""
        if isinstance(self.source, Capture):
            read = self.source.read
            return {name: to_torch(read(name), entry.dtype).to(device) for name, entry in self._layers().items()}
        import torch

        dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
        tensors: dict[str, torch.Tensor] = {}
        integers: dict[str, torch.Tensor] = {}
        alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, entry in self._layers().items():
            alike.setdefault((entry.dtype, entry.shape), []).append(name)
        for (dtype, shape), names in alike.items():  # few allocations, and few views to make
            every = torch.empty((len(names), *shape), dtype=dtypes[dtype], device=device)
            tensors.update(zip(names, every.unbind(), strict=True))
            integers.update(zip(names, every.view(_integer(every)).unbind(), strict=True))
        tensors = {name: tensors[name] for name in self._layers()}

        def view(part: PartSpec) -> torch.Tensor:
            whole = integers[part.tensor.name]
            return whole if part.tokens == part.tensor.rows else whole[:, part.first : part.first + part.tokens]

        def room(block: WindowSpec) -> Room:
            views = map(view, block.parts)
            if isinstance(engine, CpuEngine):
                return Room(tuple(view.numpy().view(f"u{view.element_size()}") for view in views))
            return Room(tuple(views))

        with naming(self.source.name):
            for result in engine.run(self.source.tasks(keys_and_values, room)):
                if result.error is not None:
                    raise result.error
        return tensors

    def to_cache(self, device: str = "cpu", config: Any = None) -> Any:
        """A ``transformers`` ``DynamicCache`` for a batch of one, of the file's layers, on ``device``.

        ``config`` is the model's, if its cache wants one.

        Raises:
            FormatError: a layer is missing, or has keys or values alone.
            KvpackError: transformers is not installed; and what :meth:`to_tensors` raises.

        """
        try:
            from transformers import DynamicCache
        except ImportError:
            raise KvpackError("a cache needs transformers: pip install 'kvpack[capture]'") from None
        names = set(self._layers())
        layers = len(names) // 2
        wanted = [(f"layers.{i}.keys", f"layers.{i}.values") for i in range(layers)]
        if not layers or names != {name for pair in wanted for name in pair}:
            raise FormatError("a cache needs keys and values of all layers from 0 on, and the file has not")
        found = self.to_tensors(device)
        cache = DynamicCache(config=config) if config is not None else DynamicCache()
        for i, (keys, values) in enumerate(wanted):
            cache.update(found[keys][None], found[values][None], i)
        return cache

    def _layers(self) -> dict[str, TensorSpec]:
        return {name: entry for name, entry in self.tensors.items() if layer_of(entry) is not None}


def _integer(tensor: torch.Tensor) -> torch.dtype:
    import torch

    return {2: torch.int16, 4: torch.int32}[tensor.element_size()]


def open_file(path: str | Path, profile: str | Path | Profile | None = None) -> Opened:
    """``kvpack.open``: a capture or a ``.kvp`` file, with the calibration profile that it needs.

    A profile is unpacked when it is first used, which takes a second: for many files open it once
    (:meth:`kvpack.profiles.Profile.open`) and give it to each.

    Raises:
        FormatError: the file is neither, or damaged.
        MismatchError: the file needs another profile.

    """
    given = profile if profile is None or isinstance(profile, Profile) else Profile.open(Path(profile))
    return Opened(open_cache(Path(path), given))
