"""What all kernels share: CUDA sources by name, compiled at run time, checked and launched on torch's tensors."""
