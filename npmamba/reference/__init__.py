"""Float64 references: slow, obvious, independent of the kernels; one file per operation."""
