"""The GPU engine: kernels run ``lossless``, ``fisher``, KIVI and TurboQuant, and the CPU runs everything else."""

from kvpack.gpu.engine.engine import GpuEngine

__all__ = ["GpuEngine"]
