"""The peers of the selective scan, written for this comparison: in the form that one would write first, and tuned.

A `ScanCase` holds the data in (batch, seqlen, dim) order, float32. Every peer turns it into its library's arrays, in
the memory order it likes best, before the clock starts. A `Peer` has three calls without arguments: `forward`,
`forward_backward` and `values`, which runs the latter and returns NumPy arrays for the check against the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@dataclass(frozen=True)
class ScanCase:
    """Inputs of one comparison.

    u, delta, z, dout: (batch, seqlen, dim); A: (dim, dstate); B, C: (batch, seqlen, dstate); D, delta_bias: (dim,).
    For the core operation z and delta_bias are None and delta is the step itself; for the full one the step is
    softplus(delta + delta_bias). Steps follow the published initialization: log-uniform from 1e-3 to 0.1.
    """

    u: np.ndarray
    delta: np.ndarray
    A: np.ndarray
    B: np.ndarray
    C: np.ndarray
    D: np.ndarray
    z: np.ndarray | None
    delta_bias: np.ndarray | None
    dout: np.ndarray

    @classmethod
    def draw(cls, batch: int, dim: int, seqlen: int, dstate: int, *, full: bool, seed: int = 0) -> ScanCase:
        """Draw a case of the given sizes."""
        rng = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        step = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (batch, seqlen, dim))).astype(np.float32)
        bias = None
        if full:
            bias = np.full(dim, np.log(np.expm1(0.01)), np.float32)
            step = np.log(np.expm1(step)) - bias
        A = -np.tile(np.arange(1, dstate + 1, dtype=np.float32), (dim, 1))
        return cls(
            u=normal(batch, seqlen, dim),
            delta=step,
            A=A,
            B=normal(batch, seqlen, dstate),
            C=normal(batch, seqlen, dstate),
            D=np.ones(dim, np.float32),
            z=normal(batch, seqlen, dim) if full else None,
            delta_bias=bias,
            dout=normal(batch, seqlen, dim),
        )

    @property
    def inputs(self) -> list[np.ndarray]:
        """The differentiable inputs that are there, in the order of `GRADIENTS`."""
        return [x for x in (getattr(self, name) for name in GRADIENTS) if x is not None]

    @property
    def states(self) -> int:
        """Number of states the scan walks through, each of which needs one exponential."""
        return self.u.size * self.A.shape[1]


@dataclass(frozen=True)
class Peer:
    """Calls without arguments; `values` returns [y, gradients...] in (batch, seqlen, dim) order."""

    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    values: Callable[[], list[np.ndarray]]


def _torch_peer(case: ScanCase, scan: Callable[..., Any]) -> Peer:
    import torch

    inputs = [torch.from_numpy(x).requires_grad_() for x in case.inputs]
    dout = torch.from_numpy(case.dout)

    def forward() -> Any:
        with torch.no_grad():
            return scan(*inputs)

    def forward_backward() -> Any:
        y = scan(*inputs)
        return y, torch.autograd.grad(y, inputs, dout)

    def values() -> list[np.ndarray]:
        y, gradients = forward_backward()
        return [y.detach().numpy(), *(g.numpy() for g in gradients)]

    return Peer(forward, forward_backward, values)


def torch_loop(case: ScanCase) -> Peer:
    """PyTorch, one step of time after the other, as one would write it: exp inside the step, inputs unbound over time.

    Unbinding matters: indexing a time step instead makes the backward pass quadratic in seqlen.
    """
    import torch

    def step(h: Any, u: Any, delta: Any, A: Any, B: Any, C: Any) -> tuple[Any, Any]:
        h = torch.exp(delta.unsqueeze(-1) * A) * h + (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        return h, (h * C.unsqueeze(1)).sum(-1)

    return _torch_peer(case, _torch_scan(step))


def torch_loop_tuned(case: ScanCase) -> Peer:
    """The same loop with the fused calls that are fastest on a CPU: addcmul for the update, bmm for the output."""
    import torch

    def step(h: Any, u: Any, delta: Any, A: Any, B: Any, C: Any) -> tuple[Any, Any]:
        inflow = (delta * u).unsqueeze(-1) * B.unsqueeze(1)
        h = torch.addcmul(inflow, torch.exp(delta.unsqueeze(-1) * A), h)
        return h, torch.bmm(h, C.unsqueeze(-1)).squeeze(-1)

    return _torch_peer(case, _torch_scan(step))


def _torch_scan(step: Callable[..., Any]) -> Callable[..., Any]:
    import torch
    from torch.nn import functional

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any = None, bias: Any = None) -> Any:
        if bias is not None:
            delta = functional.softplus(delta + bias)
        h, outputs = u.new_zeros(u.shape[0], *A.shape), []
        for inputs in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
            h, y = step(h, *inputs[:2], A, *inputs[2:])
            outputs.append(y)
        y = torch.addcmul(torch.stack(outputs, 1), u, D)
        return y if z is None else y * functional.silu(z)

    return scan


def mambapy_pscan(case: ScanCase) -> Peer:
    """mambapy's parallel scan in PyTorch, with the discretization around it that its Mamba block uses."""
    import torch
    from mambapy.pscan import pscan
    from torch.nn import functional

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any = None, bias: Any = None) -> Any:
        if bias is not None:
            delta = functional.softplus(delta + bias)
        decay = torch.exp(delta.unsqueeze(-1) * A)
        states = pscan(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
        y = torch.addcmul((states @ C.unsqueeze(-1)).squeeze(-1), u, D)
        return y if z is None else y * functional.silu(z)

    return _torch_peer(case, scan)


def jax_scan(case: ScanCase) -> Peer:
    """JAX `lax.scan`, jitted, as one would write it; time leads, as `lax.scan` wants it."""
    return _jax_peer(case, jax_selective_scan)


def jax_scan_tuned(case: ScanCase) -> Peer:
    """The fastest of sixteen forms tried: channels innermost, einsum, states recomputed in the backward pass."""
    return _jax_peer(case, jax_selective_scan_tuned)


def _jax_peer(case: ScanCase, scan: Callable[..., Any]) -> Peer:
    import jax

    leading = [x.swapaxes(0, 1) if x.ndim == 3 else x for x in case.inputs]
    inputs = [jax.numpy.asarray(np.ascontiguousarray(x)) for x in leading]
    dout = jax.numpy.asarray(np.ascontiguousarray(case.dout.swapaxes(0, 1)))

    def pull(dout: Any, *inputs: Any) -> Any:
        y, vjp = jax.vjp(scan, *inputs)
        return y, vjp(dout)

    run, run_back = jax.jit(scan), jax.jit(pull)

    def forward_backward() -> Any:
        return jax.block_until_ready(run_back(dout, *inputs))

    def values() -> list[np.ndarray]:
        y, gradients = forward_backward()
        return [x.swapaxes(0, 1) if x.ndim == 3 else x for x in map(np.asarray, [y, *gradients])]

    return Peer(lambda: jax.block_until_ready(run(*inputs)), forward_backward, values)


def jax_selective_scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any = None, bias: Any = None) -> Any:
    """Return the scan's output; u, delta, z: (seqlen, batch, dim), B, C: (seqlen, batch, dstate), A: (dim, dstate)."""
    import jax
    import jax.numpy as jnp

    def step(h: Any, inputs: Any) -> tuple[Any, Any]:
        u, delta, B, C = inputs
        h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, None]
        return h, (h * C[:, None]).sum(-1)

    delta = delta if bias is None else jax.nn.softplus(delta + bias)
    y = jax.lax.scan(step, jnp.zeros((u.shape[1], *A.shape), u.dtype), (u, delta, B, C))[1] + u * D
    return y if z is None else y * jax.nn.silu(z)


def jax_selective_scan_tuned(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any = None, bias: Any = None
) -> Any:
    """Return what `jax_selective_scan` returns, faster on a CPU."""
    import jax
    import jax.numpy as jnp

    delta = delta if bias is None else jax.nn.softplus(delta + bias)
    rows = A.T

    @jax.checkpoint
    def step(h: Any, inputs: Any) -> tuple[Any, Any]:
        u, delta, B, C = inputs
        h = jnp.exp(delta[:, None] * rows) * h + (delta * u)[:, None] * B[..., None]
        return h, jnp.einsum("bnd,bn->bd", h, C)

    y = jax.lax.scan(step, jnp.zeros((u.shape[1], *rows.shape), u.dtype), (u, delta, B, C))[1] + u * D
    return y if z is None else y * jax.nn.silu(z)


PEERS: dict[str, Callable[[ScanCase], Peer]] = {
    "torch loop": torch_loop,
    "torch loop, tuned": torch_loop_tuned,
    "JAX scan": jax_scan,
    "JAX scan, tuned": jax_scan_tuned,
    "mambapy pscan": mambapy_pscan,
}
