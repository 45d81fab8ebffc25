"""Scans that others wrote, in the form in which ``npmamba fuzz`` calls them; `docs/fuzzing.md` says what it found.

Each function hands its arguments to the library as they are: nothing is mended on the way. They need `torch`,
`mambapy`, `transformers` and `jax`, from PyPI; run from the root of the repository::

    npmamba fuzz benchmarks.fuzz_targets:mambapy --backward benchmarks.fuzz_targets:mambapy_backward \\
        --library torch --order "batch seqlen dim" --maps variable --examples 1000

The arrays are those of the library, and the order of axes is its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def _torch_backward(fn: Callable[..., Any], dout: Any, dlast_state: Any = None, **arguments: Any) -> dict[str, Any]:
    """Return the gradients that PyTorch's autograd finds, zeros where an argument has no influence."""
    torch = importlib.import_module("torch")
    arrays = {n: x.requires_grad_() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    out = fn(**arguments)
    (out if dlast_state is None else (out[0] * dout).sum() + (out[1] * dlast_state).sum()).backward(
        dout if dlast_state is None else None
    )
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in arrays.items()}


# --- mambapy: its parallel scan, arrays (batch, seqlen, dim) of PyTorch ---


def mambapy(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None) -> Any:
    """`mambapy.mamba.MambaBlock.selective_scan`, which runs `mambapy.pscan` and needs D; y in the dtype of u."""
    block = importlib.import_module("mambapy.mamba").MambaBlock
    return block.selective_scan(None, u, delta, A, B, C, A.new_zeros(A.shape[0]) if D is None else D).to(u.dtype)


def mambapy_backward(dout: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None) -> dict[str, Any]:
    """Gradients by pscan's own backward pass."""
    return _torch_backward(mambapy, dout, u=u, delta=delta, A=A, B=B, C=C, D=D)


# --- transformers: what MambaMixer runs where its CUDA kernels are not installed, arrays (batch, dim, seqlen) ---


def transformers(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False, *, return_last_state: bool = False,
) -> Any:  # fmt: skip
    """`transformers.models.mamba.modeling_mamba.mamba_selective_scan`; y in the dtype of u, as its caller has it."""
    scan = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    out = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    return (out[0].to(u.dtype), out[1]) if return_last_state else out.to(u.dtype)


def transformers_backward(dout: Any, dlast_state: Any = None, **arguments: Any) -> dict[str, Any]:
    """Gradients by PyTorch."""

    def scan(**given: Any) -> Any:
        return transformers(**given, return_last_state=dlast_state is not None)

    return _torch_backward(scan, dout, dlast_state, **arguments)


def transformers_step(
    state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Any:  # fmt: skip
    """`transformers.models.mamba.modeling_mamba.mamba_selective_state_update`."""
    step = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_state_update
    return step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, z)


def transformers_conv1d(x: Any, weight: Any, bias: Any = None, *, activation: str | None = None) -> Any:
    """`transformers.models.mamba.modeling_mamba.causal_conv1d_fn`."""
    convolve = importlib.import_module("transformers.models.mamba.modeling_mamba").causal_conv1d_fn
    return convolve(x, weight, bias, activation)


def transformers_conv1d_backward(dout: Any, dlast_state: Any = None, **arguments: Any) -> dict[str, Any]:
    """Gradients by PyTorch."""
    return _torch_backward(transformers_conv1d, dout, **arguments)


# --- JAX: the scan as one would write it, by jax.lax.associative_scan; arrays (batch, dim, seqlen) ---


def jax(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None) -> Any:
    """Scan by `jax.lax.associative_scan`."""
    return _jax_functions()[0](u, delta, A, B, C, D)


def jax_backward(dout: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None) -> dict[str, Any]:
    """Gradients by `jax.vjp`."""
    return _jax_functions()[1](dout, u, delta, A, B, C, D)


def _jax_functions() -> tuple[Any, Any]:
    """Return scan and backward, compiled for each shape; in float64 where that is asked for."""
    if not _JAX:
        library = importlib.import_module("jax")
        library.config.update("jax_enable_x64", True)
        jnp = library.numpy

        def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
            a = jnp.exp(delta[..., None] * A[None, :, None, :])
            x = (delta * u)[..., None] * B.swapaxes(1, 2)[:, None]
            _, h = library.lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (a, x), axis=2)
            y = (h * C.swapaxes(1, 2)[:, None]).sum(-1)
            return (y if D is None else y + D[None, :, None] * u).astype(u.dtype)

        def backward(dout: Any, u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
            gradients = library.vjp(scan, u, delta, A, B, C, D)[1](dout)
            return {name: x for name, x in zip("u delta A B C D".split(), gradients, strict=True) if x is not None}

        _JAX.extend((library.jit(scan), library.jit(backward)))
    return _JAX[0], _JAX[1]


_JAX: list[Any] = []
