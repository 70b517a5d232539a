"""NVIDIA GPUs: the runtime, the kernels, and the engine that batches work for them."""
