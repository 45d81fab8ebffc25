"""Parts of a scan's arguments: some of its steps, rows, channels or states, and the same arguments said otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference import functions

TIMED = ("u", "delta", "z", "B", "C")


def is_timed(arguments: dict[str, Any], name: str) -> bool:
    """Tell whether an argument has a time axis; B and C are constant where they have two axes.

    >>> is_timed({"B": np.ones((2, 3))}, "B")
    False
    """
    x = arguments.get(name)
    return name in TIMED and x is not None and np.ndim(x) > 2


def steps(arguments: dict[str, Any], index: Any, **changes: Any) -> dict[str, Any]:
    """Return the arguments of the steps that `index` (a slice, mask or array) picks, with `changes`.

    >>> case = {"u": np.arange(3.0)[None, None], "A": -np.ones((1, 1))}
    >>> steps(case, slice(1, None), reverse=True)["u"]
    array([[[1., 2.]]])
    """
    part = {name: arguments[name][..., index] for name in TIMED if is_timed(arguments, name)}
    if arguments.get("seq_idx") is not None:
        part["seq_idx"] = arguments["seq_idx"][:, index]
    return {**arguments, **part, **changes}


def rows(arguments: dict[str, Any], index: Any, **changes: Any) -> dict[str, Any]:
    """Return the arguments of some batch rows, with `changes`."""
    names = [name for name in TIMED if is_timed(arguments, name)] + ["initial_state", "seq_idx"]
    return {**arguments, **{n: arguments[n][index] for n in names if arguments.get(n) is not None}, **changes}


def channels(arguments: dict[str, Any], index: Any) -> dict[str, Any]:
    """Return the arguments of the channels whose numbers `index` lists; each gets a group of its own, if it has
    one."""
    index, dim = np.asarray(index), np.shape(arguments["u"])[1]
    part: dict[str, Any] = {}
    for name in ("u", "delta", "z", "initial_state"):
        part[name] = None if arguments.get(name) is None else arguments[name][:, index]
    for name in ("A", "D", "delta_bias"):
        part[name] = None if arguments.get(name) is None else arguments[name][index]
    for name in ("B", "C"):
        M = arguments[name]
        part[name] = M[index] if M.ndim == 2 else M if M.ndim == 3 else M[:, index // (dim // M.shape[1])]
    return {**arguments, **part}


def states(arguments: dict[str, Any], index: Any) -> dict[str, Any]:
    """Return the arguments of some states, in the order of `index`."""
    part = {name: np.take(arguments[name], index, axis=-1 if arguments[name].ndim == 2 else -2) for name in "BC"}
    part["A"] = arguments["A"][:, index]
    if arguments.get("initial_state") is not None:
        part["initial_state"] = arguments["initial_state"][..., index]
    return {**arguments, **part}


def backwards(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with time flipped, and `reverse` the other way round: they mean the same but for a flip."""
    return steps(arguments, np.s_[::-1], reverse=not arguments.get("reverse", False))


def raw_step(arguments: dict[str, Any]) -> tuple[Any, bool]:
    """Return delta + delta_bias in float64, and whether the step is the softplus of that."""
    raw = np.asarray(arguments["delta"], np.float64)
    if arguments.get("delta_bias") is not None:
        raw = raw + np.asarray(arguments["delta_bias"], np.float64)[:, None]
    return raw, bool(arguments.get("delta_softplus"))


def step_size(arguments: dict[str, Any]) -> Any:
    """Return the step Delta = softplus(delta + delta_bias), or what of it is asked for, in float64.

    >>> step_size({"delta": np.zeros((1, 1, 1)), "delta_softplus": True})
    array([[[0.69314718]]])
    """
    raw, softplus = raw_step(arguments)
    return functions.softplus(raw) if softplus else raw


def with_step(arguments: dict[str, Any], Delta: Any) -> dict[str, Any]:
    """Return the arguments with the step itself as delta, and no bias or softplus."""
    delta = np.asarray(Delta).astype(arguments["u"].dtype)
    return {**arguments, "delta": delta, "delta_bias": None, "delta_softplus": False}


def map_per_channel(arguments: dict[str, Any], name: str) -> Any:
    """Return B or C as every channel sees it at every step: (batch, dim, dstate, seqlen), a fresh array.

    >>> map_per_channel({"u": np.ones((1, 2, 3)), "B": np.array([[5.0], [6.0]])}, "B")[0, :, 0]
    array([[5., 5., 5.],
           [6., 6., 6.]])
    """
    M, (batch, dim, seqlen) = arguments[name], np.shape(arguments["u"])
    if M.ndim == 2:
        return np.broadcast_to(M[None, :, :, None], (batch, *M.shape, seqlen)).copy()
    M = M[:, None] if M.ndim == 3 else M
    return np.repeat(M, dim // M.shape[1], axis=1)


def with_map_per_channel(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with a B and a C of as many groups as channels."""
    return {**arguments, **{name: map_per_channel(arguments, name) for name in ("B", "C")}}
