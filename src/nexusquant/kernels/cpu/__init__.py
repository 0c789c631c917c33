"""Numba kernels for CPUs: `operator` is what the rest of the package sees."""
