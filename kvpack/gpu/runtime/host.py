"""The host's side of a GPU: finding one, and streams with pinned memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpack.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher

AUTO_BYTES = 256 << 20
"""Less work than this, of all files of a command together, is the CPU's with ``auto``: starting a GPU takes longer."""


def find_gpu(device: str, size: int) -> tuple[Launcher | None, str | None]:
    """The GPU that ``device`` (``auto``, ``cpu``, ``cuda``, ``cuda:1``) asks for work on ``size`` bytes, and why not.

    A reason comes only where a GPU was asked for and the CPU has to do; ``auto`` falls back in silence.

    Raises:
        UsageError: another device.

    """
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu") and (kind != "cuda" or (index and not index.isdecimal())):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {device!r}")
    if device == "cpu" or (device == "auto" and size < AUTO_BYTES):
        return None, None
    reason = _why_not(int(index or 0))
    if reason is None:
        from kvpack.gpu.runtime.launch import Gpu

        try:
            return Gpu(int(index or 0)), None
        except (RuntimeError, UnsupportedError) as error:
            reason = str(error).splitlines()[0]
    return None, None if device == "auto" else reason


def _why_not(index: int) -> str | None:
    try:
        ctypes.CDLL("libcuda.so.1")  # before torch, which takes a second to import
    except OSError:
        return "no NVIDIA driver"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, none is number {index}"
    return None


class Slot:
    """A stream, so that batches overlap; on a stand-in for a GPU, nothing."""

    def __init__(self, gpu: Launcher) -> None:
        """On ``gpu``."""
        import torch

        cuda: Any = torch.cuda
        self.torch, self.device = torch, gpu.device
        self.on_gpu = gpu.device != "cpu"
        self.stream = cuda.Stream(gpu.device) if self.on_gpu else None
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> Slot:
        """Make it torch's current stream."""
        if self.stream is not None:
            cuda: Any = self.torch.cuda
            self._context = cuda.stream(self.stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Back to the stream before."""
        if self.stream is not None:
            self._context.__exit__(*error)

    def pinned(self, size: int) -> torch.Tensor:
        """Bytes that the device can be sent from, the same every time: their last use must be over."""
        if self._staging is None or len(self._staging) < size:
            self._staging = self.torch.empty(size * 5 // 4, dtype=self.torch.uint8, pin_memory=self.on_gpu)
        return self._staging[:size]

    def send(self, host: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting."""
        return host.to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """To pinned memory, without waiting."""
        host = self.torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.on_gpu)
        return host.copy_(tensor, non_blocking=True)

    def record_event(self) -> Callable[[], None]:
        """What waits for all that was asked of the stream so far, and for nothing that is asked later."""
        if self.stream is None:
            return lambda: None
        event = self.stream.record_event()
        wait: Callable[[], None] = event.synchronize
        return wait

    def synchronize(self) -> None:
        """Wait for all that was asked of the device: what other streams made may then be used on this one."""
        if self.on_gpu:
            self.torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """For all that was asked of the stream."""
        if self.stream is not None:
            self.stream.synchronize()
