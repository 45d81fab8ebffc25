"""Looking inside a model: which characters it lets in, and how long its states remember.

A Mamba layer chooses a step size for each token t and channel d, ``Delta = softplus(dt_proj(x_proj(x)))`` (Gu and
Dao 2023, section 3.2). A state then decays by ``exp(Delta * A)`` and takes in ``Delta * B * x``: a large step
forgets the past and lets the token in, a small one keeps the past and passes the token by. That choice is the
*selection* in "selective state space model"; here it can be looked at as plain arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npmamba import lm
from npmamba.backend import beside, on_host


def _parts(model: Any) -> tuple[Any, Any]:
    return model if isinstance(model, tuple) else (model.params, model.config)


def step_sizes(model: Any, input_ids: ArrayLike) -> list[NDArray[np.floating]]:
    """Return Delta of every layer, token and channel.

    Parameters
    ----------
    model : MambaLM, or (params, config)
    input_ids : array (batch, seqlen), integers

    Returns
    -------
    list of n_layer NumPy arrays (batch, seqlen, d_inner)
        All positive.

    Raises
    ------
    TypeError, ValueError
        If `input_ids` are not integers of that shape.
    """
    params, config = _parts(model)
    ids, seen = np.asarray(on_host(input_ids)), []

    def observe(*, delta: Any, delta_bias: Any, **others: Any) -> None:
        x = on_host(delta).swapaxes(1, 2) + on_host(delta_bias)
        seen.append(np.logaddexp(x, x.dtype.type(0)))  # softplus

    lm._check_ids("input_ids", ids, 2)
    lm._hidden(params, config, beside("step_sizes", next(iter(params.values())), ids), observe=observe)
    return seen


def selectivity(model: Any, input_ids: ArrayLike) -> NDArray[np.floating]:
    """Return the mean step size of each layer at each token: what a heat map over the text shows.

    Parameters
    ----------
    model : MambaLM, or (params, config)
    input_ids : array (seqlen,) or (batch, seqlen), integers

    Returns
    -------
    array (n_layer, seqlen) or (n_layer, batch, seqlen)

    Examples
    --------
    >>> from npmamba import MambaConfig, MambaLM
    >>> model = MambaLM(MambaConfig(vocab_size=5, d_model=8, n_layer=2))
    >>> selectivity(model, np.array([1, 2, 3])).shape
    (2, 3)
    """
    ids = np.asarray(on_host(input_ids))
    means = np.stack([delta.mean(axis=-1) for delta in step_sizes(model, np.atleast_2d(ids))])
    return means[:, 0] if ids.ndim == 1 else means


def time_constants(model: Any, input_ids: ArrayLike) -> NDArray[np.floating]:
    """Return in how many tokens each state decays by the factor e, at the mean step of its channel.

    A state left to itself goes as ``h_t = exp(Delta * A) h_{t-1}``: its time constant is ``1 / (Delta * |A|)``.

    Parameters
    ----------
    model : MambaLM, or (params, config)
    input_ids : array (seqlen,) or (batch, seqlen), integers
        The text over which Delta is averaged.

    Returns
    -------
    array (n_layer, d_inner, d_state)

    Examples
    --------
    A fresh model remembers 1 to 1000 tokens in its slowest states, as A starts at -1 to -16 and Delta near
    0.001 to 0.1:

    >>> from npmamba import MambaConfig, MambaLM
    >>> taus = time_constants(MambaLM(MambaConfig(vocab_size=5, d_model=64, n_layer=1)), np.array([1, 2, 3]))
    >>> taus.shape, bool(1 < taus[..., 0].min() < taus[..., 0].max() < 2000)
    ((1, 128, 16), True)
    """
    params, config = _parts(model)
    rates = []
    for n, delta in enumerate(step_sizes(model, np.atleast_2d(np.asarray(on_host(input_ids))))):
        mean = delta.mean(axis=(0, 1))[:, None]
        rates.append(mean * np.exp(on_host(params[f"backbone.layers.{n}.mixer.A_log"])))
    return 1.0 / np.stack(rates)
