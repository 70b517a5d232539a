"""Open files from Python: ``kvpack.open(path)`` gives tensors, on a GPU if wanted, and a cache for a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.cache import PartSpec, WindowSpec
from kvpack.codecs.model import LanguageModel
from kvpack.engine import CpuEngine, Engine, Room, awaited
from kvpack.errors import FormatError, KvpackError, UsageError, naming
from kvpack.formats.captures import layer_of
from kvpack.formats.safetensors import TensorSpec
from kvpack.formats.source import Capture
from kvpack.gpu.runtime.host import AUTO_BYTES, find_gpu
from kvpack.jobs.reader import KvpFile, keys_and_values, open_cache
from kvpack.numerics.floats import TORCH_NAMES, Bits, to_torch
from kvpack.profiles import Profile

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher


class Opened:
    """A capture or a ``.kvp`` file that is open."""

    def __init__(self, source: Capture | KvpFile) -> None:
        """Wrap an open capture or ``.kvp`` file."""
        self.source = source
        self.tensors: Mapping[str, TensorSpec] = source.tensors
        self.metadata: Mapping[str, str] = source.metadata

    def read(self, name: str) -> Bits:
        """Return a tensor's bit patterns as unsigned integers, in its shape.

        Raises:
            KeyError: The file has no such tensor.
            CorruptError: The file is damaged.

        """
        return self.source.read(name)

    def to_tensors(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Return keys and values of all layers by name, in shape ``[H, T, D]`` and their own dtype, on ``device``.

        ``device`` is for example ``cpu`` or ``cuda:1``.

        If the codec of a ``.kvp`` file has GPU kernels, the GPU decodes it, and the decoded data does not pass through
        main memory. The CPU decodes what the kernels do not support, and the result is copied to the GPU.

        Raises:
            UsageError: There is no such GPU.
            CorruptError: The file is damaged.
            MismatchError: The file needs a calibration profile.

        """
        if device == "cpu":
            return self.tensors_by(CpuEngine(), "cpu")
        gpu, reason = find_gpu(device, AUTO_BYTES)
        if gpu is None:
            raise UsageError(f"no GPU for {device!r}: {reason or 'asked for the CPU'}")
        return self.tensors_on(gpu)

    def tensors_on(self, gpu: Launcher) -> dict[str, torch.Tensor]:
        """Return the same as :meth:`to_tensors`, on a GPU that was found before."""
        from kvpack.gpu.engine import GpuEngine

        return self.tensors_by(GpuEngine(gpu), gpu.device)

    def tensors_by(self, engine: Engine, device: str) -> dict[str, torch.Tensor]:
        """Return the same as :meth:`to_tensors`, decoded by the caller's ``engine``, which must be for ``device``."""
        if isinstance(self.source, Capture):
            read = self.source.read
            return {name: to_torch(read(name), entry.dtype).to(device) for name, entry in self._layers().items()}
        with naming(self.source.name):
            self.source.require_whole()
        import torch

        tensors: dict[str, torch.Tensor] = {}
        integers: dict[str, torch.Tensor] = {}
        alike: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, entry in self._layers().items():
            alike.setdefault((entry.dtype, entry.shape), []).append(name)
        for (dtype, shape), names in alike.items():  # one allocation for all tensors of one dtype and shape
            every = torch.empty((len(names), *shape), dtype=getattr(torch, TORCH_NAMES[dtype]), device=device)
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

        with naming(self.source.name), awaited(engine.run(self.source.tasks(keys_and_values, room))) as results:
            for result in results:
                if result.error is not None:
                    raise result.error
        return tensors

    def to_cache(self, device: str = "cpu", config: Any = None) -> Any:
        """Return a ``transformers`` ``DynamicCache`` of the file's layers, for a batch of one, on ``device``.

        ``config`` is the model's configuration, if its cache needs one.

        Raises:
            FormatError: A layer is missing, or a layer has only keys or only values.
            KvpackError: transformers is not installed. The errors of :meth:`to_tensors` are raised too.

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


def open_file(
    path: str | Path, profile: str | Path | Profile | None = None, model: LanguageModel | None = None
) -> Opened:
    """Open a capture or a ``.kvp`` file, with the calibration profile or the model that it needs: ``kvpack.open``.

    A profile is unpacked when it is first used, which takes a second. For many files, open the profile once
    (:meth:`kvpack.profiles.Profile.open`) and pass it to each call. Files of the codec ``replay`` need the ``model``,
    a :class:`kvpack.capture.ReplayModel`.

    Raises:
        FormatError: The file is neither a capture nor a ``.kvp`` file, or it is damaged.
        MismatchError: The file needs another profile.

    """
    given = profile if profile is None or isinstance(profile, Profile) else Profile.open(Path(profile))
    return Opened(open_cache(Path(path), given, model))
