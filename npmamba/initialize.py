"""The published initialization of Mamba's parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmamba.config import MambaConfig


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> np.ndarray:
    return rng.uniform(-bound, bound, shape)


def _dt_bias(rng: np.random.Generator, config: MambaConfig) -> np.ndarray:
    """Return the bias whose softplus is log-uniform in [dt_min, dt_max]."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = np.maximum(np.exp(rng.uniform(low, high, config.d_inner)), config.dt_init_floor)
    return dt + np.log(-np.expm1(-dt))  # the inverse of softplus


def _initial(rng: np.random.Generator, key: str, shape: tuple[int, ...], config: MambaConfig) -> np.ndarray:
    """Draw one parameter by the end of its checkpoint key."""
    if key.endswith(".A_log"):
        return np.broadcast_to(np.log(np.arange(1.0, config.d_state + 1)), shape)
    if key.endswith((".D", "norm.weight", "norm_f.weight")):
        return np.ones(shape)
    if key.endswith(("embeddings.weight", "lm_head.weight")):
        return rng.normal(0.0, config.initializer_range, shape)
    if key.endswith("dt_proj.bias"):
        return _dt_bias(rng, config)
    if key.endswith("dt_proj.weight"):
        bound = config.dt_rank**-0.5 * config.dt_scale
        return np.full(shape, bound) if config.dt_init == "constant" else _uniform(rng, shape, bound)
    if ".conv1d." in key:
        return _uniform(rng, shape, config.d_conv**-0.5)
    if key.endswith(("in_proj.bias", "out_proj.bias")):
        return np.zeros(shape)
    weight = _uniform(rng, shape, shape[-1] ** -0.5)
    if key.endswith("out_proj.weight") and config.rescale_prenorm_residual:
        weight /= math.sqrt(config.n_layer)  # each layer adds to the stream
    return weight


def init_params(config: MambaConfig, *, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    r"""Draw the parameters of a language model as the authors of Mamba do.

    Projections are uniform in :math:`\pm 1/\sqrt{\text{inputs}}`, ``out_proj`` divided by the root of the number of
    layers; ``A_log = log(1 .. d_state)`` on every channel; D and the norms are 1; ``softplus(dt_proj.bias)`` is
    log-uniform in [dt_min, dt_max]; embeddings, and a head that is not tied to them, are normal.

    Parameters
    ----------
    config : MambaConfig
        Sizes and ranges.
    seed : int
        Not negative. Each parameter has a stream of its own, made from the seed and its key: what a model shares with
        a deeper one, or with one without biases, starts at the same values.
    dtype : dtype
        float32 or float64; both are drawn in float64, float32 is rounded from it.

    Returns
    -------
    dict
        Array by checkpoint key.

    Raises
    ------
    TypeError, ValueError
        If `dtype` is another one, or `seed` is no integer or negative.

    Notes
    -----
    Sections 3.5, 3.6 and E.2 of Gu & Dao, arXiv 2312.00752, and the authors' code (which draws the step log-uniform,
    where section 3.6 writes uniform).

    Examples
    --------
    >>> config = MambaConfig(vocab_size=5, d_model=16, n_layer=1)
    >>> params = init_params(config, seed=0)
    >>> params["backbone.layers.0.mixer.D"].shape, params["backbone.embeddings.weight"].dtype
    ((32,), dtype('float32'))
    """
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise TypeError(f"init_params: dtype must be float32 or float64, got {np.dtype(dtype)}")
    params = {}
    for key, shape in config.parameter_shapes().items():
        rng = np.random.default_rng([seed, *key.encode()])
        params[key] = np.array(_initial(rng, key, shape, config), dtype, order="C")
    return params
