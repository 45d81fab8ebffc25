"""Tools for tests: `npmamba.testing.interpret` runs CUDA kernels with no device, and finds their races."""
