"""Small models to test with: odd sizes, and parameters that all show in the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from npmamba.config import MambaConfig
from npmamba.initialize import init_params

SPREAD = {"A_log": 0.3, "dt_proj.bias": 0.5, "embeddings.weight": 1.0}


def tiny(**options: Any) -> MambaConfig:
    """Return the configuration of a model of two layers whose sizes all differ, changed by `options`."""
    sizes: dict[str, Any] = {"vocab_size": 11, "d_model": 10, "n_layer": 2, "d_state": 3, "d_conv": 4, "dt_rank": 2}
    return MambaConfig(**{**sizes, **options})


def random_params(config: MambaConfig, seed: int = 0, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Draw parameters near the published initialization, none at a value it would give.

    A bias of zero or a D of one would hide that it was left out or mixed up. In float32 they stay nearer, lest some
    model be so badly conditioned that rounding shows.
    """
    rng = np.random.default_rng((seed, 7))
    near = 1.0 if np.dtype(dtype) == np.float64 else 0.5
    drawn = init_params(config, seed=seed, dtype=np.float64)
    spread = {key: next((s for end, s in SPREAD.items() if key.endswith(end)), 0.3) for key in drawn}
    return {key: (x + near * spread[key] * rng.standard_normal(x.shape)).astype(dtype) for key, x in drawn.items()}


def random_tokens(config: MambaConfig, batch: int, seqlen: int, seed: int = 0) -> np.ndarray:
    """Draw tokens (batch, seqlen)."""
    return np.random.default_rng((seed, 8)).integers(0, config.vocab_size, (batch, seqlen))


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> MambaConfig:
    """Draw the configuration of a small model: every option, and sizes down to one.

    Only d_model is 4 or more: the norm of a shorter row now and then divides by almost nothing.
    """
    options = {
        "d_model": draw(st.sampled_from([4, 7, 16])),
        "n_layer": draw(st.sampled_from([1, 2, 3])),
        "d_state": draw(st.sampled_from([1, 3, 16])),
        "d_conv": draw(st.sampled_from([1, 2, 4])),
        "expand": draw(st.sampled_from([1, 1.5, 2])),
        "dt_rank": draw(st.sampled_from([1, 3])),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "tie_embeddings": draw(st.booleans()),
        "discretization": draw(st.sampled_from(["euler", "zoh"])),
        "norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
    }
    return tiny(**{**options, **fixed})
