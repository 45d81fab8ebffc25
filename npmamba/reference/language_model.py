"""The Mamba language model in float64: the whole model on one page, from tokens to the loss.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), figure 3 and
algorithm 2. Nothing is fused, recorded or skipped here: a block normalizes its input, mixes it, and adds the result
to the stream it came from. Parameters have the names of published checkpoints and may be complex.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference import causal_conv1d, cross_entropy, embedding, rms_norm, selective_scan
from npmamba.reference.functions import as_float64


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Compute x @ weight.T + bias, with weight (out, in).

    >>> linear(np.array([1.0, 2.0]), np.array([[3.0, 4.0]]), np.array([0.5]))
    array([11.5])
    """
    y = x @ as_float64(weight).T
    return y if bias is None else y + as_float64(bias)


def mixer(parameters: Any, x: Any, config: Any, *, state: Any = None, seq_idx: Any = None) -> tuple[Any, Any]:
    """Mix a sequence by one Mamba block, without its norm and residual.

    The sequence is widened to two streams. One is filtered in time, by a short convolution and by the scan whose
    step, input and output maps it sets itself; the other is the gate that the result passes.

    Parameters
    ----------
    parameters : dict of str to array
        By the last part of their checkpoint keys: ``"in_proj.weight"``, ``"A_log"``, ...
    x : (batch, seqlen, d_model) real or complex
    config : MambaConfig
    state : pair of arrays, optional
        What came before: the last inputs of the convolution (batch, d_inner, d_conv - 1) and the state of the scan
        (batch, d_inner, d_state); None: nothing.
    seq_idx : (batch, seqlen) integers, optional
        Sequence numbers of a packed batch; negative ones are padding.

    Returns
    -------
    out : (batch, seqlen, d_model) float64, or complex128 if any argument is complex
    state : pair of arrays
    """
    p = parameters
    u, z = np.split(linear(x, p["in_proj.weight"], p.get("in_proj.bias")), 2, axis=-1)
    taps, h = (None, None) if state is None else state
    u, taps = causal_conv1d.forward(
        u.swapaxes(1, 2), p["conv1d.weight"][:, 0], p.get("conv1d.bias"),
        activation="silu", initial_state=taps, seq_idx=seq_idx,
    )  # fmt: skip
    projected = linear(u.swapaxes(1, 2), p["x_proj.weight"])
    dt, B, C = np.split(projected, [config.dt_rank, config.dt_rank + config.d_state], axis=-1)
    y, h = selective_scan.forward(
        u,
        linear(dt, p["dt_proj.weight"]).swapaxes(1, 2),
        -np.exp(as_float64(p["A_log"])),
        B.swapaxes(1, 2),
        C.swapaxes(1, 2),
        p["D"],
        z.swapaxes(1, 2),
        p["dt_proj.bias"],
        delta_softplus=True,
        initial_state=h,
        discretization=config.discretization,
        seq_idx=seq_idx,
    )
    return linear(y.swapaxes(1, 2), p["out_proj.weight"], p.get("out_proj.bias")), (taps, h)


def logits(params: Any, config: Any, input_ids: Any, *, seq_idx: Any = None) -> Any:
    """Compute the scores of every next token.

    Parameters
    ----------
    params : dict of str to array
        By checkpoint key; real or complex.
    config : MambaConfig
    input_ids : (batch, seqlen) integers
    seq_idx : (batch, seqlen) integers, optional
        Sequence numbers of a packed batch; negative ones are padding.

    Returns
    -------
    (batch, seqlen, vocab) float64, or complex128 if any parameter is complex

    Examples
    --------
    >>> from npmamba import MambaConfig
    >>> config = MambaConfig(vocab_size=3, d_model=2, n_layer=1)
    >>> params = {key: np.zeros(shape) for key, shape in config.parameter_shapes().items()}
    >>> logits(params, config, np.array([[0, 2]]))
    array([[[0., 0., 0.],
            [0., 0., 0.]]])
    """
    x = embedding.forward(params["backbone.embeddings.weight"], input_ids)
    for i in range(config.n_layer):
        prefix = f"backbone.layers.{i}."
        layer = {key.removeprefix(prefix): p for key, p in params.items() if key.startswith(prefix)}
        block = {key.removeprefix("mixer."): p for key, p in layer.items()}
        normed = rms_norm.forward(x, layer["norm.weight"], eps=config.norm_eps)
        x = x + mixer(block, normed, config, seq_idx=seq_idx)[0]
    x = rms_norm.forward(x, params["backbone.norm_f.weight"], eps=config.norm_eps)
    return linear(x, params["backbone.embeddings.weight" if config.tie_embeddings else "lm_head.weight"])


def loss(
    params: Any, config: Any, input_ids: Any, targets: Any, *, seq_idx: Any = None, ignore_index: int = -100
) -> Any:
    """Compute the mean cross entropy, in nats per token, of `targets` (batch, seqlen) at each position.

    Parameters are those of `logits` and of ``cross_entropy.forward``; the target of a position is the token after it.

    Returns
    -------
    () float64, or complex128 if any parameter is complex

    Examples
    --------
    >>> from npmamba import MambaConfig
    >>> config = MambaConfig(vocab_size=8, d_model=2, n_layer=1)
    >>> params = {key: np.zeros(shape) for key, shape in config.parameter_shapes().items()}
    >>> float(loss(params, config, np.array([[0, 2]]), np.array([[2, 5]])) / np.log(2))
    3.0
    """
    scores = logits(params, config, input_ids, seq_idx=seq_idx)
    return cross_entropy.forward(scores, targets, ignore_index=ignore_index)
