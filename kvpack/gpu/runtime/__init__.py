"""What the stages' GPU files share: CUDA sources by name, compiled at run time, launched on torch's tensors."""
