"""Tools for tests: `npmamba.testing.interpret` runs CUDA kernels on NumPy arrays, with no device, and finds their races."""
