"""The Mamba block: figure 3 of the paper, as one function of arrays.

Activations are (batch, seqlen, channels), contiguous; the operations want (batch, channels, seqlen) and read the same
memory through a transposed view. So u and z are halves of in_proj's output and dt, B, C slices of x_proj's: no
activation is copied on the way forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from npmamba.autodiff.algebra import exp, linear, split
from npmamba.config import MambaConfig
from npmamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from npmamba.ops.selective_scan import selective_scan
from npmamba.ops.selective_state_update import selective_state_update


class BlockState(NamedTuple):
    """What a block remembers between calls.

    Attributes
    ----------
    conv : array (batch, d_inner, d_conv - 1)
        The last inputs of the convolution.
    ssm : array (batch, d_inner, d_state)
        The state of the state space model.
    """

    conv: Any
    ssm: Any


def rates(A_log: Any) -> Any:
    """Return ``A = -exp(A_log)``, the rates of the states: negative whatever the parameter."""
    return -exp(A_log)


def mamba_block(
    parameters: Mapping[str, Any],
    x: Any,
    config: MambaConfig,
    *,
    state: BlockState | None = None,
    seq_idx: Any = None,
    observe: Callable[..., None] | None = None,
) -> tuple[Any, BlockState]:
    """Mix a sequence by one Mamba block (without its norm and residual).

    ::

        u, z     = in_proj(x)
        u        = silu(causal_conv1d(u))
        dt, B, C = x_proj(u)
        delta    = softplus(dt_proj(dt))
        y        = selective_scan(u, delta, A, B, C, D) silu(z)
        out      = out_proj(y)

    Parameters
    ----------
    parameters : mapping
        The block's parameters by the last part of their checkpoint keys: ``"in_proj.weight"``, ``"A_log"``, ...
    x : array (batch, seqlen, d_model)
        Normalized input.
    config : MambaConfig
        Sizes and discretization.
    state : BlockState, optional
        What came before; nothing if None.
    seq_idx : integer array (batch, seqlen), optional
        Sequence numbers of a packed batch.
    observe : callable, optional
        Called as ``observe(delta=..., delta_bias=..., A=..., B=..., C=...)`` with the arguments of the scan, for
        inspection; delta comes before bias and softplus.

    Returns
    -------
    out : array (batch, seqlen, d_model)
    state : BlockState
        What the next call continues from.

    Raises
    ------
    TypeError, ValueError
        From the operation that an argument does not fit, which names it.

    Notes
    -----
    Figure 3 and algorithm 2 of Gu & Dao, "Mamba", arXiv 2312.00752. Differentiable in the parameters, `x` and `state`.

    Examples
    --------
    >>> import numpy as np
    >>> config = MambaConfig(vocab_size=5, d_model=8, n_layer=1)
    >>> shapes = {name.removeprefix("mixer."): shape for name, shape in config.layer_shapes().items()}
    >>> parameters = {name: np.zeros(shape) for name, shape in shapes.items()}
    >>> out, state = mamba_block(parameters, np.ones((2, 3, 8)), config)
    >>> out.shape, state.conv.shape, state.ssm.shape
    ((2, 3, 8), (2, 16, 3), (2, 16, 16))
    """
    p = parameters
    u, z = split(linear(x, p["in_proj.weight"], p.get("in_proj.bias")), (config.d_inner, config.d_inner))
    u, conv_state = causal_conv1d(
        u.swapaxes(1, 2),
        p["conv1d.weight"].reshape(config.d_inner, config.d_conv),
        p.get("conv1d.bias"),
        activation="silu",
        initial_state=state and state.conv,
        return_last_state=True,
        seq_idx=seq_idx,
    )
    dt, B, C = split(
        linear(u.swapaxes(1, 2), p["x_proj.weight"]), (config.dt_rank, config.d_state, config.d_state)
    )
    delta = linear(dt, p["dt_proj.weight"]).swapaxes(1, 2)
    A, B, C = rates(p["A_log"]), B.swapaxes(1, 2), C.swapaxes(1, 2)
    if observe is not None:
        observe(delta=delta, delta_bias=p["dt_proj.bias"], A=A, B=B, C=C)
    y, ssm_state = selective_scan(
        u,
        delta,
        A,
        B,
        C,
        p["D"],
        z.swapaxes(1, 2),
        p["dt_proj.bias"],
        True,
        initial_state=state and state.ssm,
        return_last_state=True,
        discretization=config.discretization,
        seq_idx=seq_idx,
    )
    out = linear(y.swapaxes(1, 2), p["out_proj.weight"], p.get("out_proj.bias"))
    return out, BlockState(conv_state, ssm_state)


def mamba_block_step(parameters: Mapping[str, Any], x: Any, config: MambaConfig, state: BlockState) -> Any:
    """Mix one token by one Mamba block; `state` is changed in place.

    Parameters
    ----------
    parameters : mapping
        As for `mamba_block`.
    x : array (batch, d_model)
        Normalized input.
    config : MambaConfig
        Sizes and discretization.
    state : BlockState
        What came before.

    Returns
    -------
    array (batch, d_model)

    Raises
    ------
    TypeError, ValueError
        From the operation that an argument does not fit, which names it.
    """
    p = parameters
    u, z = split(linear(x, p["in_proj.weight"], p.get("in_proj.bias")), (config.d_inner, config.d_inner))
    weight = p["conv1d.weight"].reshape(config.d_inner, config.d_conv)
    u = causal_conv1d_update(state.conv, u, weight, p.get("conv1d.bias"), activation="silu")
    dt, B, C = split(linear(u, p["x_proj.weight"]), (config.dt_rank, config.d_state, config.d_state))
    y = selective_state_update(
        state.ssm,
        u,
        linear(dt, p["dt_proj.weight"]),
        rates(p["A_log"]),
        B,
        C,
        p["D"],
        z,
        p["dt_proj.bias"],
        True,
        discretization=config.discretization,
    )
    return linear(y, p["out_proj.weight"], p.get("out_proj.bias"))
