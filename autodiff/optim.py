"""Optimizers: pairs of pure functions over trees of arrays.

``optimizer.init(params)`` makes the state, ``optimizer.update(grads, state, params)`` returns new parameters
and a new state and changes neither. A training step is then three lines::

    loss, grads = value_and_grad(loss_function)(params, batch)
    scale, norm = clip_factor(grads, 1.0)
    params, state = optimizer.update(grads, state, params, scale)

Trees of CuPy arrays are updated without waiting for the GPU: a norm and a factor stay there, as arrays ().
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npmamba.autodiff.tree import tree_items, tree_map, tree_map_path
from npmamba.backend import array_module, twin
from npmamba.shapes import compute_dtype

Schedule = Callable[[int], float]


class Optimizer(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params, grad_scale=1.0) -> (params, state)``.

    The gradients are multiplied by `grad_scale`, a number or an array (), on their way.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


class AdamWState(NamedTuple):
    """State of `adamw`: updates made so far, running means of the gradient (m) and of its square (v)."""

    step: int
    m: Any
    v: Any


class SGDState(NamedTuple):
    """State of `sgd`: updates made so far, and a tree of velocities, None without momentum."""

    step: int
    velocity: Any


def adamw(
    learning_rate: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    mask: Any = None,
) -> Optimizer:
    """Adam with decoupled weight decay, from Loshchilov and Hutter, arXiv:1711.05101, as torch.optim.AdamW::

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g²        t = 1, 2, ...
        p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Parameters
    ----------
    learning_rate : float or callable
        A number, or a function of the updates made so far, such as `warmup_cosine`.
    betas, eps, weight_decay : float
        As in the equations.
    mask : tree of bool or callable, optional
        Which leaves decay: a tree like the parameters (see `decay_mask`), or a function ``(path, array)``.
        By default all do.

    Returns
    -------
    Optimizer
        Its state is an `AdamWState`. m and v have the parameter's dtype, float32 for shorter ones. A short
        parameter is rounded after each update, so small updates are lost: train float32 copies.

    Raises
    ------
    ValueError
        From update, if a gradient has not its parameter's shape.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import adamw
    >>> params = {"w": np.array([1.0, -1.0])}
    >>> optimizer = adamw(0.5, weight_decay=0.0)
    >>> params, state = optimizer.update({"w": np.array([3.0, -0.2])}, optimizer.init(params), params)
    >>> params["w"].round(6), state.step
    (array([ 0.5, -0.5]), 1)
    """

    def init(params: Any) -> AdamWState:
        return AdamWState(0, tree_map(_zeros, params), tree_map(_zeros, params))

    def update(grads: Any, state: AdamWState, params: Any, grad_scale: Any = 1.0) -> tuple[Any, AdamWState]:
        step = state.step + 1
        decays = mask
        if mask is None or callable(mask):
            decays = tree_map_path(mask or (lambda path, p: True), params)
        paths, leaves, g, m, v, decays = _columns("adamw", params, grads, state.m, state.v, decays)
        if not paths:
            return params, state._replace(step=step)
        _check_libraries("adamw", paths, params=leaves, grads=g, m=m, v=v)
        options = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
        options |= {"step": step, "lr": _value(learning_rate, state.step), "grad_scale": grad_scale}
        new = twin("optimizer_update", leaves[0]).adamw_update(leaves, g, m, v, decays, **options)
        new_params, m, v = (_like(params, column) for column in new)
        return new_params, AdamWState(step, m, v)

    return Optimizer(init, update)


def _columns(name: str, params: Any, grads: Any, *others: Any) -> list[list[Any]]:
    """Return the paths of all parameters, and for each tree its leaves in that order."""
    rows: list[tuple[Any, ...]] = []

    def see(path: str, p: Any, g: Any, *leaves: Any) -> None:
        _check_gradient(name, path, g, p)
        rows.append((path, p, g, *leaves))

    tree_map_path(see, params, grads, *others)
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(3 + len(others))]


def _like(tree: Any, leaves: list[Any]) -> Any:
    """Return a tree like `tree` with other leaves."""
    supply = iter(leaves)
    return tree_map(lambda _: next(supply), tree)


def _check_libraries(name: str, paths: list[str], **columns: list[Any]) -> Any:
    """Return the library of all arrays; a TypeError names two that are not of one."""
    arrays = [x for column in columns.values() for x in column if x is not None]
    kinds = {type(x) for x in arrays}
    if kinds == {np.ndarray}:
        return np
    if len(kinds) == 1 and len({x.data.device_id for x in arrays}) == 1:  # as it should be: one stands for all
        return array_module(name, **{next(iter(columns)): arrays[0]})
    named = {f"{what}[{path!r}]": x for what, column in columns.items() for path, x in zip(paths, column, strict=True)}
    return array_module(name, **named)


def sgd(learning_rate: float | Schedule, momentum: float = 0.0) -> Optimizer:
    """Gradient descent: ``velocity = momentum · velocity + g``, ``p -= lr · velocity``, as torch.optim.SGD.

    Parameters
    ----------
    learning_rate : float or callable
        A number, or a function of the updates made so far.
    momentum : float
        Without it no velocity is kept.

    Returns
    -------
    Optimizer
        Its state is an `SGDState`.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import sgd
    >>> optimizer = sgd(0.5)
    >>> params = {"w": np.array([1.0])}
    >>> optimizer.update({"w": np.array([1.0])}, optimizer.init(params), params)
    ({'w': array([0.5])}, SGDState(step=1, velocity=None))
    """

    def init(params: Any) -> SGDState:
        return SGDState(0, tree_map(_zeros, params) if momentum else None)

    def update(grads: Any, state: SGDState, params: Any, grad_scale: Any = 1.0) -> tuple[Any, SGDState]:
        lr = _value(learning_rate, state.step)
        paths, leaves, grads, velocities = _columns("sgd", params, grads, state.velocity)
        xp = _check_libraries("sgd", paths, params=leaves, grads=grads, velocity=velocities)
        new: list[Any] = []
        for i, (p, g, velocity) in enumerate(zip(leaves, grads, velocities, strict=True)):
            dtype = compute_dtype(p.dtype)
            g = xp.asarray(g, dtype) * xp.asarray(grad_scale, dtype)
            new.append(xp.asarray(g if velocity is None else momentum * velocity + g, dtype))
            leaves[i] = xp.asarray(xp.asarray(p, dtype) - lr * new[i], p.dtype)
        return _like(params, leaves), SGDState(state.step + 1, _like(params, new) if momentum else None)

    return Optimizer(init, update)


def _zeros(p: Any) -> Any:
    return np.zeros_like(p, dtype=compute_dtype(p.dtype), order="C")


def _value(learning_rate: float | Schedule, step: int) -> float:
    return float(learning_rate(step) if callable(learning_rate) else learning_rate)


def _check_gradient(name: str, path: str, grad: Any, param: Any) -> None:
    if getattr(grad, "shape", None) != param.shape:
        came = f"shape {grad.shape}" if hasattr(grad, "shape") else type(grad).__name__
        raise ValueError(f"{name}: the gradient of {path} must have shape {param.shape}, got {came}")


def decay_mask(params: Any) -> Any:
    """Return the tree of booleans that says which parameters decay in a Mamba model.

    A_log, D, the weights of norms and all biases do not: they set time scales and offsets, not directions.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import decay_mask
    >>> decay_mask({"mixer.A_log": np.zeros(1), "mixer.out_proj.weight": np.zeros(1)})
    {'mixer.A_log': False, 'mixer.out_proj.weight': True}
    """
    spared = (".A_log", ".D", "norm.weight", "norm_f.weight", ".bias")
    return tree_map_path(lambda path, _: not f".{path}".endswith(spared), params)


def global_norm(tree: Any) -> Any:
    """Return the Euclidean norm of all entries of all arrays, summed in float64.

    A float; of CuPy arrays an array (), for which nobody has waited.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import global_norm
    >>> global_norm({"a": np.array([3.0]), "b": np.array([[4.0]])})
    5.0
    """
    return _norm_and_factor("global_norm", tree, math.inf)[0]


def clip_factor(grads: Any, max_norm: float) -> tuple[Any, Any]:
    """Return what to multiply gradients by so that their global norm is at most `max_norm`, and their norm.

    Handed to ``optimizer.update(grads, state, params, factor)``, clipping takes no pass over memory of its own.

    Parameters
    ----------
    grads : tree of arrays
    max_norm : float
        Above 0; infinity for no limit.

    Returns
    -------
    factor : float
        1 if the norm is small enough or not finite.
    norm : float
        NaN or infinity if a gradient is. Of CuPy arrays, both are arrays (), for which nobody has waited.

    Raises
    ------
    ValueError
        If `max_norm` is not above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import clip_factor
    >>> clip_factor({"w": np.array([3.0, 4.0])}, 1.0)
    (0.2, 5.0)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_factor: max_norm must be above 0, got {max_norm}")
    norm, factor = _norm_and_factor("clip_factor", grads, max_norm)
    return factor, norm


def _norm_and_factor(name: str, tree: Any, max_norm: float) -> tuple[Any, Any]:
    items = tree_items(tree)
    if not items:
        return 0.0, 1.0
    paths, arrays = (list(column) for column in zip(*items, strict=True))
    _check_libraries(name, paths, tree=arrays)
    return twin("optimizer_update", arrays[0]).global_norm(arrays, max_norm)


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, Any]:
    """Scale gradients so that their global norm is at most `max_norm`; `clip_factor` saves a pass over memory.

    Parameters
    ----------
    grads : tree of arrays
    max_norm : float
        Above 0.

    Returns
    -------
    grads : tree of arrays
        Unchanged if they are short enough or their norm is not finite; NumPy's are then the same arrays.
    norm : float
        The norm before clipping; NaN or infinity if a gradient is. Of CuPy arrays an array (), see `clip_factor`.

    Raises
    ------
    ValueError
        If `max_norm` is not above 0.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import clip_by_global_norm
    >>> clip_by_global_norm({"w": np.array([3.0, 4.0])}, 1.0)
    ({'w': array([0.6, 0.8])}, 5.0)
    """
    if not max_norm > 0:
        raise ValueError(f"clip_by_global_norm: max_norm must be above 0, got {max_norm}")
    norm, factor = _norm_and_factor("clip_by_global_norm", grads, max_norm)
    if isinstance(factor, float) and factor == 1.0:
        return grads, norm
    return tree_map(lambda g: _scaled(g, factor), grads), norm


def _scaled(g: Any, factor: Any) -> Any:
    """Return ``g * factor`` in the dtype of `g`."""
    if isinstance(factor, float):
        return np.asarray(g * factor, g.dtype)
    return (g * factor.astype(compute_dtype(g.dtype))).astype(g.dtype, copy=False)


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> Schedule:
    """Return a learning rate that rises linearly to `peak`, then falls along half a cosine to `final`::

        peak (s + 1) / (warmup_steps + 1)                                    s < warmup_steps
        final + (peak - final) (1 + cos(pi (s - warmup) / (total - warmup))) / 2     up to total_steps

    Parameters
    ----------
    peak, final : float
        Rates; `final` also holds from `total_steps` on.
    warmup_steps, total_steps : int
        The rate is `peak` at ``s = warmup_steps``, where s counts the updates made so far.

    Returns
    -------
    callable
        From s to the learning rate.

    Raises
    ------
    ValueError
        Unless ``0 <= warmup_steps < total_steps``.

    Examples
    --------
    >>> from npmamba.autodiff import warmup_cosine
    >>> rate = warmup_cosine(1.0, warmup_steps=1, total_steps=5, final=0.1)
    >>> [round(rate(s), 3) for s in (0, 1, 3, 5, 9)]
    [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_cosine: warmup_steps must be in [0, total_steps), got {warmup_steps} of {total_steps}"
        )

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

    return rate
