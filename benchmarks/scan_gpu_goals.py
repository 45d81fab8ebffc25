"""The shapes of the scan's benchmark on a GPU, what the published kernel takes there, and what is to be reached."""

from __future__ import annotations

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((8, 1536, 2048), (1, 1536, 8192), (8, 5120, 2048), (64, 256, 512), (1, 64, 1048576))
"""(batch, dim, seqlen), with 16 states."""
DEVICE = "H200"
"""What the times below are of."""
ORIGINAL = {
    ("forward", "float32"): (0.897, 0.509, 2.896, 0.324, 11.49),
    ("forward", "bfloat16"): (0.460, 0.274, 1.473, 0.159, 9.86),
    ("backward", "float32"): (2.108, 1.155, 6.678, 0.795, 23.84),
    ("backward", "bfloat16"): (1.817, 1.104, 5.749, 0.634, 23.20),
}
"""Milliseconds of the CUDA C++ kernel published with Mamba (state-spaces/mamba), built for sm_90 with its own flags."""
GOALS = {
    ("forward", "float32"): (0.225, 0.125, 0.70, 0.08, 0.75),
    ("forward", "bfloat16"): (0.185, 0.11, 0.58, 0.064, 0.70),
    ("backward", "float32"): (0.60, 0.33, 1.90, 0.225, 1.8),
    ("backward", "bfloat16"): (0.60, 0.36, 1.9, 0.21, 1.8),
}
"""Milliseconds to reach."""
SAVING = 1.15
"""What a forward pass that saves may take of one that does not."""
SCRATCH = 2.0
"""What may be allocated beside the results, for both passes together, in multiples of u (float32)."""


def known(device: str, direction: str, dtype: str, index: int) -> dict[str, float | None]:
    """Return the published kernel's time at a shape and the goal, None where there is none."""
    key = direction, dtype
    if DEVICE not in device or key not in GOALS:
        return {"original_ms": None, "goal_ms": None}
    return {"original_ms": ORIGINAL[key][index], "goal_ms": GOALS[key][index]}
