"""Mamba language models of the peers, and one AdamW step of each: JAX written by hand, PyTorch around mambapy's blocks.

Both start from npmamba's parameters, a flat dict by checkpoint key, so that their losses can be compared with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

BETAS, EPS = (0.9, 0.95), 1e-8

Step = Callable[[], float]
"""Takes one training step on its own parameters and returns the loss before it."""


def jax_logits(params: dict[str, Any], config: Any, ids: Any, scan: Callable[..., Any]) -> Any:
    """Return logits (seqlen, batch, vocab) for `ids` (seqlen, batch): time leads, as lax.scan wants it."""
    import jax
    import jax.numpy as jnp

    def norm(x: Any, weight: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + config.norm_eps) * weight

    def conv(x: Any, weight: Any, bias: Any) -> Any:
        width = weight.shape[-1]
        padded = jnp.pad(x, ((width - 1, 0), (0, 0), (0, 0)))
        return bias + sum(weight[:, 0, k] * padded[k : k + x.shape[0]] for k in range(width))

    def mixer(x: Any, p: Callable[[str], Any]) -> Any:
        u, z = jnp.split(x @ p("in_proj.weight").T, 2, axis=-1)
        u = jax.nn.silu(conv(u, p("conv1d.weight"), p("conv1d.bias")))
        cuts = (config.dt_rank, config.dt_rank + config.d_state)
        dt, B, C = jnp.split(u @ p("x_proj.weight").T, cuts, axis=-1)
        A = -jnp.exp(p("A_log"))
        y = scan(u, dt @ p("dt_proj.weight").T, A, B, C, p("D"), z, p("dt_proj.bias"))
        return y @ p("out_proj.weight").T

    table = params["backbone.embeddings.weight"]
    x = table[ids]
    for i in range(config.n_layer):
        layer = f"backbone.layers.{i}."
        normed = norm(x, params[layer + "norm.weight"])
        x = x + mixer(normed, lambda name, layer=layer: params[f"{layer}mixer.{name}"])
    return norm(x, params["backbone.norm_f.weight"]) @ table.T


def jax_step(
    params: dict[str, np.ndarray],
    config: Any,
    ids: np.ndarray,
    labels: np.ndarray,
    lr: float,
    scan: Callable[..., Any],
) -> Step:
    """Return a jitted AdamW step around a `scan` of `peers`; `labels` (batch, seqlen) are those of the next tokens."""
    import jax
    import jax.numpy as jnp

    time_ids, time_labels = jnp.asarray(ids.T), jnp.asarray(labels.T)

    def loss(params: Any) -> Any:
        log_p = jax.nn.log_softmax(jax_logits(params, config, time_ids, scan))
        return -jnp.take_along_axis(log_p, time_labels[..., None], -1).mean()

    def update(params: Any, m: Any, v: Any, count: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        m = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, m, grads)
        v = jax.tree.map(lambda v, g: BETAS[1] * v + (1 - BETAS[1]) * g * g, v, grads)
        first, second = 1 - BETAS[0] ** count, 1 - BETAS[1] ** count

        def move(p: Any, m: Any, v: Any) -> Any:
            return p - lr * (m / first / (jnp.sqrt(v / second) + EPS) + (0.1 * p if p.ndim > 1 else 0))

        return jax.tree.map(move, params, m, v), m, v, value

    jitted = jax.jit(update, donate_argnums=(0, 1, 2))
    now = {name: jnp.array(x) for name, x in params.items()}
    state = [now, jax.tree.map(jnp.zeros_like, now), jax.tree.map(jnp.zeros_like, now)]
    count = 0

    def step() -> float:
        nonlocal count
        count += 1
        *state[:], value = jitted(*state, jnp.float32(count))
        jax.block_until_ready(state)
        return float(value)

    return step


def mambapy_step(params: dict[str, np.ndarray], config: Any, ids: np.ndarray, labels: np.ndarray, lr: float) -> Step:
    """Return an AdamW step of mambapy's `Mamba` (parallel scan) between an embedding and its tied head.

    That is what `mambapy.lm.LM` computes, except for the tied head; its module cannot be imported without a GPU.
    """
    import torch
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    from torch.nn import functional

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            own = MambaConfig(config.d_model, config.n_layer, d_state=config.d_state, d_conv=config.d_conv)
            self.embeddings = torch.nn.Embedding(config.vocab_size, config.d_model)
            self.blocks = Mamba(own)
            self.norm_f = RMSNorm(config.d_model, config.norm_eps)

        def forward(self, ids: Any) -> Any:
            return self.norm_f(self.blocks(self.embeddings(ids))) @ self.embeddings.weight.T

    model = Model()
    renamed = {name.removeprefix("backbone.").replace("layers.", "blocks.layers."): x for name, x in params.items()}
    model.load_state_dict({name: torch.tensor(x) for name, x in renamed.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr, BETAS, EPS, weight_decay=0.1, fused=True)
    inputs, targets = torch.from_numpy(ids), torch.from_numpy(labels)

    def step() -> float:
        loss = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
