"""Optimizers: pairs of pure functions over trees of arrays.

``optimizer.init(params)`` makes the state, ``optimizer.update(grads, state, params)`` returns new parameters
and a new state and changes neither. A training step is then three lines::

    loss, grads = value_and_grad(loss_function)(params, batch)
    grads, norm = clip_by_global_norm(grads, 1.0)
    params, state = optimizer.update(grads, state, params)
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
    """``init(params) -> state`` and ``update(grads, state, params) -> (params, state)``."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


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

    def update(grads: Any, state: AdamWState, params: Any) -> tuple[Any, AdamWState]:
        lr, step = _value(learning_rate, state.step), state.step + 1
        decays = mask
        if mask is None or callable(mask):
            decays = tree_map_path(mask or (lambda path, p: True), params)

        def one(path: str, p: Any, g: Any, m: Any, v: Any, decays: bool) -> Any:
            _check_gradient("adamw", path, g, p)
            return _adamw_array(p, g, m, v, step, lr, betas, eps, weight_decay if decays else 0.0)

        new_params, m, v = _map_to_trees(3, one, params, grads, state.m, state.v, decays)
        return new_params, AdamWState(step, m, v)

    return Optimizer(init, update)


def _adamw_array(
    param: Any, grad: Any, m: Any, v: Any, step: int,
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Return the new param, m and v of one array, C-contiguous; `step` counts this update, so it starts at 1.

    NumPy arrays go through one kernel that reads every number once, others through the equations as they stand.
    """
    xp = array_module("adamw", param=param, grad=grad, m=m, v=v)
    b1, b2 = betas
    if xp is np:
        options = {"lr": lr, "beta1": b1, "beta2": b2, "eps": eps, "weight_decay": weight_decay}
        return twin("optimizer_update", param).adamw_update(param, grad, m, v, step=step, **options)
    return _adamw_by_array_operations(xp, param, grad, m, v, step, lr, b1, b2, eps, weight_decay)


def _adamw_by_array_operations(
    xp: Any, param: Any, grad: Any, m: Any, v: Any, step: int,
    lr: float, b1: float, b2: float, eps: float, weight_decay: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    p, g, m, v = (xp.ascontiguousarray(x).reshape(param.shape) for x in (param, grad, m, v))
    p, g = p.astype(m.dtype, copy=False), g.astype(m.dtype, copy=False)
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    scale = xp.sqrt(v) / math.sqrt(1 - b2**step) + eps
    new = (1 - lr * weight_decay) * p - lr / (1 - b1**step) * (m / scale)
    return new.astype(param.dtype, copy=False), m, v


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

    def update(grads: Any, state: SGDState, params: Any) -> tuple[Any, SGDState]:
        lr = _value(learning_rate, state.step)

        def one(path: str, p: Any, g: Any, velocity: Any) -> tuple[Any, Any]:
            _check_gradient("sgd", path, g, p)
            xp, dtype = array_module("sgd", param=p, grad=g), compute_dtype(p.dtype)
            new = xp.asarray(g, dtype) if velocity is None else xp.asarray(momentum * velocity + g, dtype)
            return xp.asarray(xp.asarray(p, dtype) - lr * new, p.dtype), new

        new_params, velocity = _map_to_trees(2, one, params, grads, state.velocity)
        return new_params, SGDState(state.step + 1, velocity if momentum else None)

    return Optimizer(init, update)


def _zeros(p: Any) -> Any:
    return np.zeros_like(p, dtype=compute_dtype(p.dtype), order="C")


def _value(learning_rate: float | Schedule, step: int) -> float:
    return float(learning_rate(step) if callable(learning_rate) else learning_rate)


def _check_gradient(name: str, path: str, grad: Any, param: Any) -> None:
    if getattr(grad, "shape", None) != param.shape:
        came = f"shape {grad.shape}" if hasattr(grad, "shape") else type(grad).__name__
        raise ValueError(f"{name}: the gradient of {path} must have shape {param.shape}, got {came}")


def _map_to_trees(count: int, f: Callable[..., Any], tree: Any, *others: Any) -> list[Any]:
    """Map `f`, which returns a tuple of `count` arrays, and return `count` trees."""
    results: list[Any] = []
    tree_map_path(lambda *leaves: results.append(f(*leaves)), tree, *others)
    columns = zip(*results, strict=True) if results else [()] * count
    supplies = [iter(column) for column in columns]
    return [tree_map(lambda _, supply=supply: next(supply), tree) for supply in supplies]


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


def global_norm(tree: Any) -> float:
    """Return the Euclidean norm of all entries of all arrays, summed in float64.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import global_norm
    >>> global_norm({"a": np.array([3.0]), "b": np.array([[4.0]])})
    5.0
    """
    return math.sqrt(math.fsum(_sum_of_squares(x) for _, x in tree_items(tree)))


def _sum_of_squares(x: Any) -> float:
    """Sum in float64, in an order that does not depend on the threads."""
    if isinstance(x, np.ndarray):
        return twin("optimizer_update", x).sum_of_squares(x)
    return float((x.astype(np.float64) ** 2).sum())


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, float]:
    """Scale gradients so that their global norm is at most `max_norm`.

    Parameters
    ----------
    grads : tree of arrays
    max_norm : float
        Above 0.

    Returns
    -------
    grads : tree of arrays
        Unchanged, the same arrays, if they are short enough or their norm is not finite.
    norm : float
        The norm before clipping; NaN or infinity if a gradient is.

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
    norm = global_norm(grads)
    if not max_norm < norm < math.inf:
        return grads, norm
    xp = array_module("clip_by_global_norm", **dict(tree_items(grads)))
    return tree_map(lambda g: xp.asarray(g * (max_norm / norm), g.dtype), grads), norm


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
