"""The host's side of a GPU: finding one, and streams with the pinned memory that bytes are sent from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvpack.errors import UnsupportedError, UsageError
from kvpack.gpu.runtime.requirements import shortcoming_of

if TYPE_CHECKING:
    import torch

    from kvpack.gpu.runtime.launch import Launcher

AUTO_BYTES = 256 << 20
"""With ``auto``, the CPU does the work if all files of a command together have fewer bytes than this.

Starting a GPU takes longer than the CPU needs for them.
"""


def find_gpu(device: str, size: int) -> tuple[Launcher | None, str | None]:
    """Return the GPU for work on ``size`` bytes, else None and the reason why there is none.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (the first GPU) or ``cuda:N`` (the GPU with number N).
        size: bytes of all files of a command together.

    Returns:
        The GPU or None; and a reason in plain words, if a GPU was asked for by name and the CPU has to do the work
        instead. With ``auto`` the CPU is taken without a reason.

    Raises:
        UsageError: ``device`` is none of these.

    """
    kind, _, index = device.partition(":")
    if device not in ("auto", "cpu") and (kind != "cuda" or (index and not index.isdecimal())):
        raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {device!r}")
    if device == "cpu" or (device == "auto" and size < AUTO_BYTES):
        return None, None
    reason = _reason_against(int(index or 0))
    if reason is None:
        from kvpack.gpu.runtime.launch import Gpu

        try:
            return Gpu(int(index or 0)), None
        except (RuntimeError, UnsupportedError) as error:
            reason = str(error).splitlines()[0]
    return None, None if device == "auto" else reason


def _reason_against(index: int) -> str | None:
    """Return why the GPU with this number cannot be used; None if nothing is known against it."""
    try:
        ctypes.CDLL("libcuda.so.1")  # asked before torch, which takes a second to import
    except OSError:
        return "no NVIDIA driver"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, none is number {index}"
    return shortcoming_of(index)


class Slot:
    """A stream of a GPU and pinned memory of its own, so that batches can overlap.

    On a stand-in for a GPU there are no streams, and nothing needs to be waited for.
    """

    def __init__(self, gpu: Launcher) -> None:
        """Make a new stream on ``gpu``."""
        import torch

        cuda: Any = torch.cuda
        self.torch, self.device = torch, gpu.device
        self.on_gpu = gpu.device != "cpu"
        self.stream = cuda.Stream(gpu.device) if self.on_gpu else None
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> Slot:
        """Make this torch's current stream."""
        if self.stream is not None:
            cuda: Any = self.torch.cuda
            self._context = cuda.stream(self.stream)
            self._context.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Make the stream current again that was current before."""
        if self.stream is not None:
            self._context.__exit__(*error)

    def pinned(self, size: int) -> torch.Tensor:
        """Return pinned memory, uint8 ``[size]``, from which the device can be sent bytes without waiting.

        It is the same memory every time, so whatever was sent from it must have arrived before this is called again.
        """
        if self._staging is None or len(self._staging) < size:
            self._staging = self.torch.empty(size * 5 // 4, dtype=self.torch.uint8, pin_memory=self.on_gpu)
        return self._staging[:size]

    def send(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``host`` on the device, without waiting for it to arrive."""
        return host.to(self.device, non_blocking=True)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of ``tensor`` in new pinned memory, without waiting for it to arrive."""
        host = self.torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.on_gpu)
        return host.copy_(tensor, non_blocking=True)

    def record_event(self) -> Callable[[], None]:
        """Return a function that waits for everything the stream was given so far, and for nothing given later."""
        if self.stream is None:
            return lambda: None
        event = self.stream.record_event()
        wait: Callable[[], None] = event.synchronize
        return wait

    def synchronize(self) -> None:
        """Wait for everything the device was given, on all streams; this stream may then use what they made."""
        if self.on_gpu:
            self.torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Wait for everything this stream was given."""
        if self.stream is not None:
            self.stream.synchronize()
