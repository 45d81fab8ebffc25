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

from npmamba.autodiff import leaves
from npmamba.autodiff.tree import tree_map, tree_map_path
from npmamba.backend import twin
from npmamba.shapes import Arguments, compute_dtype, shown

Schedule = Callable[[int], float]


class Optimizer(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params, grad_scale=1.0) -> (params, state)``.

    The gradients are multiplied by `grad_scale`, a number or an array (), on their way. `adamw` also takes
    ``donate=True``: then the new parameters and means may take the memory of the old ones, which are lost. That saves
    memory, and on a GPU most of the host's time. No array may stand in two places of the trees.
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
        A number that is not negative, or a function of the updates made so far, such as `warmup_cosine`.
    betas : pair of float
        b1 and b2 of the equations, in [0, 1).
    eps, weight_decay : float
        As in the equations, at least 0.
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
        If a number is out of its range. From update, if a gradient, or a mean in the state, has not its parameter's
        shape.
    TypeError
        If a number is none. From update, if a leaf is no floating array, or `state` is not from init.

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

    b1, b2 = _check_adamw(learning_rate, betas, eps, weight_decay)

    def init(params: Any) -> AdamWState:
        _leaves_of("adamw", params)
        return AdamWState(0, tree_map(_zeros, params), tree_map(_zeros, params))

    def update(
        grads: Any, state: AdamWState, params: Any, grad_scale: Any = 1.0, *, donate: bool = False
    ) -> tuple[Any, AdamWState]:
        Arguments("adamw").flag("donate", donate)
        leaves.is_state("adamw", state, AdamWState)
        leaves.is_scalar("adamw", "grad_scale", grad_scale)
        paths, p = _leaves_of("adamw", params)
        if not paths:
            return params, state._replace(step=state.step + 1)
        decays = mask
        if mask is None or callable(mask):
            decays = tree_map_path(mask or (lambda path, p: True), params)
        _, (_, g, m, v, decays) = leaves.columns("adamw", params, grads=grads, m=state.m, v=state.v, mask=decays)
        leaves.library("adamw", paths, params=p, grads=g, m=m, v=v)
        for what, column in {"the gradient": g, "m": m, "v": v}.items():
            leaves.same_shapes("adamw", what, paths, column, p)
        options = {"beta1": b1, "beta2": b2, "eps": eps, "weight_decay": weight_decay, "grad_scale": grad_scale}
        options |= {"step": state.step + 1, "lr": leaves.rate("adamw", learning_rate, state.step), "donate": donate}
        new = twin("optimizer_update", p[0]).adamw_update(p, g, m, v, decays, **options)
        new_params, m, v = (_like(params, column) for column in new)
        return new_params, AdamWState(state.step + 1, m, v)

    return Optimizer(init, update)


def _check_adamw(learning_rate: Any, betas: Any, eps: Any, weight_decay: Any) -> tuple[float, float]:
    """Check what `adamw` is given and return the two betas."""
    leaves.not_negative("adamw", eps=eps, weight_decay=weight_decay)
    if not callable(learning_rate):
        leaves.rate("adamw", learning_rate, 0)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"adamw: betas must be a pair of numbers, got {shown(betas)}")
    check = Arguments("adamw")
    b1, b2 = (check.number(f"betas[{i}]", beta, lambda x: 0 <= x < 1, "in [0, 1)") for i, beta in enumerate(betas))
    return b1, b2


def _leaves_of(name: str, params: Any) -> tuple[list[str], list[Any]]:
    """Return the paths and leaves of `params`, which must be floating arrays."""
    paths, (arrays,) = leaves.columns(name, params)
    if paths:
        leaves.library(name, paths, params=arrays)
    return paths, arrays


def _like(tree: Any, new: list[Any]) -> Any:
    """Return a tree like `tree` with other leaves."""
    if leaves.is_flat(tree):
        return dict(zip(tree, new, strict=True))
    supply = iter(new)
    return tree_map(lambda _: next(supply), tree)


def sgd(learning_rate: float | Schedule, momentum: float = 0.0) -> Optimizer:
    """Gradient descent: ``velocity = momentum · velocity + g``, ``p -= lr · velocity``, as torch.optim.SGD.

    Parameters
    ----------
    learning_rate : float or callable
        A number that is not negative, or a function of the updates made so far.
    momentum : float
        At least 0; without it no velocity is kept.

    Returns
    -------
    Optimizer
        Its state is an `SGDState`.

    Raises
    ------
    ValueError, TypeError
        As `adamw`.

    Examples
    --------
    >>> import numpy as np
    >>> from npmamba.autodiff import sgd
    >>> optimizer = sgd(0.5)
    >>> params = {"w": np.array([1.0])}
    >>> optimizer.update({"w": np.array([1.0])}, optimizer.init(params), params)
    ({'w': array([0.5])}, SGDState(step=1, velocity=None))
    """

    leaves.not_negative("sgd", momentum=momentum)
    if not callable(learning_rate):
        leaves.rate("sgd", learning_rate, 0)

    def init(params: Any) -> SGDState:
        _leaves_of("sgd", params)
        return SGDState(0, tree_map(_zeros, params) if momentum else None)

    def update(grads: Any, state: SGDState, params: Any, grad_scale: Any = 1.0) -> tuple[Any, SGDState]:
        leaves.is_state("sgd", state, SGDState)
        leaves.is_scalar("sgd", "grad_scale", grad_scale)
        _leaves_of("sgd", params)
        lr = leaves.rate("sgd", learning_rate, state.step)
        paths, (p, g, velocities) = leaves.columns("sgd", params, grads=grads, velocity=state.velocity)
        xp = leaves.library("sgd", paths, params=p, grads=g, velocity=velocities)
        leaves.same_shapes("sgd", "the gradient", paths, g, p)
        if state.velocity is not None:
            leaves.same_shapes("sgd", "velocity", paths, velocities, p)
        for i, velocity in enumerate(velocities):
            p[i], velocities[i] = _sgd_step(xp, p[i], g[i], velocity, lr, momentum, grad_scale)
        return _like(params, p), SGDState(state.step + 1, _like(params, velocities) if momentum else None)

    return Optimizer(init, update)


def _sgd_step(xp: Any, p: Any, g: Any, velocity: Any, lr: float, momentum: float, grad_scale: Any) -> tuple[Any, Any]:
    dtype = compute_dtype(p.dtype)
    new = xp.asarray(g, dtype) * xp.asarray(grad_scale, dtype)
    new = xp.asarray(new if velocity is None else momentum * velocity + new, dtype)
    return xp.asarray(xp.asarray(p, dtype) - lr * new, p.dtype), new


def _zeros(p: Any) -> Any:
    return np.zeros_like(p, dtype=compute_dtype(p.dtype), order="C")


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
    norm, factor = _norm_and_factor("clip_factor", grads, leaves.positive("clip_factor", "max_norm", max_norm))
    return factor, norm


def _norm_and_factor(name: str, tree: Any, max_norm: float) -> tuple[Any, Any]:
    paths, (arrays,) = leaves.columns(name, tree)
    if not paths:
        return 0.0, 1.0
    leaves.library(name, paths, tree=arrays)
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
    max_norm = leaves.positive("clip_by_global_norm", "max_norm", max_norm)
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
        Unless ``0 <= warmup_steps < total_steps`` and the rates are finite and not negative.
    TypeError
        If a rate is no number, or a number of steps no integer.

    Examples
    --------
    >>> from npmamba.autodiff import warmup_cosine
    >>> rate = warmup_cosine(1.0, warmup_steps=1, total_steps=5, final=0.1)
    >>> [round(rate(s), 3) for s in (0, 1, 3, 5, 9)]
    [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    leaves.not_negative("warmup_cosine", peak=peak, final=final)
    for name, steps in {"warmup_steps": warmup_steps, "total_steps": total_steps}.items():
        Arguments("warmup_cosine").integer(name, steps, -math.inf, math.inf)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            "warmup_cosine: warmup_steps must be in [0, total_steps), "
            f"got {shown(warmup_steps)} of {shown(total_steps)}"
        )

    def rate(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / (warmup_steps + 1)
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2

    return rate
