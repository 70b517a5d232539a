"""Numerical helpers of all other packages: bit patterns of floats, the checksum, and compilation by numba."""
