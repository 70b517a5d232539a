"""The engine of a GPU: ``lossless``, ``fisher``, KIVI and TurboQuant by kernels, everything else by the CPU."""

from kvpack.gpu.engine.engine import GpuEngine

__all__ = ["GpuEngine"]
