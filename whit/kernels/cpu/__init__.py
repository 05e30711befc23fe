"""Kernels compiled for the CPU, apart because they need numba, which is not installed everywhere."""
