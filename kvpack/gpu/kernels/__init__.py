"""CUDA sources and the functions that launch them: one folder for each stage, and ``common`` for what all include."""
