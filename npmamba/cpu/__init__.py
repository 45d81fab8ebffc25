"""CPU twins: Numba kernels on NumPy arrays, one file per operation."""
