"""Other people's scans, called like ours: other array libraries, time before channels, other names.

A scan under test is called with NumPy arrays and the keywords of `npmamba.selective_scan`. `adapted` puts a function of
PyTorch, JAX, CuPy or another library in that form::

    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    check_scan(adapted(selective_scan_fn, "torch", device="cuda"))
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

TIMED = ("u", "delta", "B", "C", "z", "dout")
"""Arguments whose last axis is time, if they have three axes or more."""
LIBRARIES = ("numpy", "torch", "jax", "cupy")


def _to(library: str, device: str | None) -> Callable[[np.ndarray], Any]:
    """Return what makes an array of `library` from a NumPy array, with memory of its own."""
    if library == "torch":
        torch = importlib.import_module("torch")
        return lambda x: _torch_array(torch, x).to(device or "cpu")
    if library in ("jax", "cupy"):
        array = importlib.import_module("jax.numpy" if library == "jax" else "cupy").array
        return lambda x: array(np.asarray(x, x.dtype.newbyteorder("=")))
    return lambda x: x


def _torch_array(torch: Any, x: np.ndarray) -> Any:
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    if x.dtype.name == "bfloat16":  # of which torch does not know that NumPy has it
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def as_numpy(x: Any) -> Any:
    """Return an array of any library as NumPy's; tuples and named tuples of them likewise, None as it is.

    >>> as_numpy((np.ones(2), None))
    (array([1., 1.]), None)
    """
    if x is None or isinstance(x, np.ndarray | np.generic):
        return x
    if isinstance(x, tuple | list):
        parts = [as_numpy(part) for part in x]
        return type(x)._make(parts) if hasattr(x, "_make") else tuple(parts)
    if isinstance(x, Mapping):
        return {name: as_numpy(part) for name, part in x.items()}
    if hasattr(x, "detach"):  # PyTorch
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            import ml_dtypes

            return x.float().numpy().astype(ml_dtypes.bfloat16)
        return x.numpy()
    return x.get() if hasattr(x, "get") else np.array(x)


def adapted(
    fn: Callable[..., Any],
    library: str = "numpy",
    *,
    order: str = "batch dim seqlen",
    names: Mapping[str, str] | None = None,
    device: str | None = None,
    **fixed: Any,
) -> Callable[..., Any]:
    """Return `fn` as a function of NumPy arrays with the keywords of `npmamba.selective_scan`.

    Parameters
    ----------
    fn : callable
        Takes arrays of `library`; returns y, or y and the last state, or for a backward pass a tuple of gradients.
    library : {"numpy", "torch", "jax", "cupy"}
        Whose arrays it takes.
    order : {"batch dim seqlen", "batch seqlen dim"}
        Where time stands in its u, delta, z and y, and in its B and C: (batch, dstate, seqlen) or (batch, seqlen,
        dstate).
    names : mapping, optional
        From our names of arguments to its own, such as ``{"delta": "dt"}``.
    device : str, optional
        A device of PyTorch, such as "cuda"; the CPU if None.
    **fixed
        More keyword arguments of `fn`, the same at each call.

    Returns
    -------
    callable
        Its signature has the arguments that `fn` has, by our names, so that what `fn` lacks is not asked of it.

    Raises
    ------
    ValueError
        If `library` or `order` is unknown.
    ImportError
        If the library is not installed.

    Examples
    --------
    >>> def running_sum(x, dt, A, B, C):           # (batch, seqlen, dim), as some write it
    ...     return np.cumsum(x * dt, axis=1)
    >>> scan = adapted(running_sum, order="batch seqlen dim", names={"u": "x", "delta": "dt"})
    >>> scan(u=np.ones((1, 2, 3)), delta=np.ones((1, 2, 3)), A=None, B=None, C=None)
    array([[[1., 2., 3.],
            [1., 2., 3.]]])
    """
    if library not in LIBRARIES:
        raise ValueError(f"adapted: library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    if order not in ("batch dim seqlen", "batch seqlen dim"):
        raise ValueError(f"adapted: order must be 'batch dim seqlen' or 'batch seqlen dim', got {order!r}")
    to, named, turned = _to(library, device), dict(names or {}), order == "batch seqlen dim"

    def give(name: str, x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return to(_turn(x) if turned and name in TIMED else x)

    @functools.wraps(fn)
    def call(**arguments: Any) -> Any:
        given = {named.get(name, name): give(name, x) for name, x in arguments.items()}
        out = as_numpy(fn(**given, **fixed))
        if "state" in arguments:  # a step changes it in place; the function was given a copy
            arguments["state"][...] = as_numpy(given[named.get("state", "state")])
        if not turned:
            return out
        if hasattr(out, "_asdict"):
            return out._replace(**{n: _turn(x) for n, x in out._asdict().items() if n in TIMED and x is not None})
        if isinstance(out, dict):
            return {name: _turn(x) if name in TIMED and x is not None else x for name, x in out.items()}
        return (_turn(out[0]), *out[1:]) if isinstance(out, tuple) else _turn(out)

    call.__signature__ = _signature(fn, named, fixed)  # type: ignore[attr-defined]
    return call


def _turn(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(-1, -2) if x.ndim > 2 else x


def _signature(fn: Callable[..., Any], named: dict[str, str], fixed: dict[str, Any]) -> inspect.Signature:
    """Return the signature of `fn` with our names, all of them keywords."""
    ours = {theirs: name for name, theirs in named.items()}
    parameters = [
        p.replace(name=ours.get(p.name, p.name), kind=p.kind if p.kind is p.VAR_KEYWORD else p.KEYWORD_ONLY)
        for p in inspect.signature(fn).parameters.values()
        if p.name not in fixed and p.kind is not p.VAR_POSITIONAL
    ]
    return inspect.Signature(parameters)
