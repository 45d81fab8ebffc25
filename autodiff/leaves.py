"""What optimizers are given: trees of arrays that must fit leaf by leaf, and numbers within their ranges.

Kernels trust their arguments and read as many numbers of a gradient, or of a running mean, as the parameter has: what
does not fit is refused here, by name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npmamba.autodiff.tree import tree_map, tree_map_path
from npmamba.backend import array_module, is_array
from npmamba.shapes import FLOATS, Arguments, dtype_name, native_dtype


def not_negative(name: str, **numbers: Any) -> None:
    """Raise TypeError or ValueError unless all `numbers` are at least 0 and finite."""
    for what, number in numbers.items():
        Arguments(name).number(what, number, lambda x: 0 <= x < math.inf, "at least 0 and finite")


def positive(name: str, what: str, number: Any) -> float:
    """Return `number`; raise TypeError or ValueError unless it is above 0, be it infinite."""
    return Arguments(name).number(what, number, lambda x: x > 0, "above 0")


def rate(name: str, learning_rate: Any, step: int) -> float:
    """Return the learning rate of the update after `step` updates."""
    value = learning_rate(step) if callable(learning_rate) else learning_rate
    what = f"learning_rate({step})" if callable(learning_rate) else "learning_rate"
    return Arguments(name).number(what, value, lambda x: 0 <= x < math.inf, "at least 0 and finite")


def is_state(name: str, state: Any, kind: type) -> None:
    """Raise TypeError unless `state` is what the optimizer's init returns."""
    if not isinstance(state, kind):
        raise TypeError(f"{name}: state must be the {kind.__name__} of init, got {type(state).__name__}")
    Arguments(name).integer("state.step", state.step, 0)  # type: ignore[attr-defined]


def is_scalar(name: str, what: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number that is not infinite, or an array ()."""
    if getattr(value, "shape", None) == () and is_array(value):
        Arguments(name).dtype(what, value)
    elif is_array(value):
        raise ValueError(f"{name}: {what} must be a number or an array of shape (), got shape {value.shape}")
    else:
        Arguments(name).number(what, value, lambda x: not math.isinf(x), "finite")


def columns(name: str, params: Any, **trees: Any) -> tuple[list[str], list[list[Any]]]:
    """Return the paths of all parameters and, for `params` and each other tree, its leaves in that order.

    Raises
    ------
    ValueError
        If a tree has other branches than `params`; it is named.
    """
    every = params, *trees.values()
    if is_flat(params) and params and all(is_flat(tree) and tree.keys() == params.keys() for tree in every):
        return list(map(str, params)), [[tree[key] for key in params] for tree in every]
    rows: list[tuple[Any, ...]] = []
    try:
        tree_map_path(lambda *row: rows.append(row), params, *trees.values())
    except ValueError:
        for what, tree in trees.items():
            _check_branches(name, what, tree, params)
        raise
    if not rows:
        return [], [[] for _ in range(1 + len(trees))]
    paths, *leaves = (list(column) for column in zip(*rows, strict=True))
    return paths, leaves


def is_flat(tree: Any) -> bool:
    """Tell whether a tree is one dict of leaves, as a model's parameters are: hundreds of them are then walked fast."""
    kinds = {type(x) for x in tree.values()} if type(tree) is dict else {type(None)}
    return not any(issubclass(kind, dict | list | tuple | None) for kind in kinds)


def _check_branches(name: str, what: str, tree: Any, params: Any) -> None:
    try:
        tree_map(lambda *_: None, params, tree)
    except ValueError as error:
        raise ValueError(f"{name}: {what} must be a tree like params, but the {error}") from None


def library(name: str, paths: list[str], **columns: list[Any]) -> Any:
    """Return the library of all arrays, None passed over.

    Raises
    ------
    TypeError
        If a leaf is no floating array, or two are not of one library; they are named.
    """
    arrays = [x for column in columns.values() for x in column if x is not None]
    kinds = {type(x) for x in arrays}
    if kinds != {np.ndarray} and not _on_one_gpu(kinds, arrays):
        array_module(name, **_named(paths, columns))
    if any(dtype_name(native_dtype(dtype)) not in FLOATS for dtype in {x.dtype for x in arrays}):
        for what, x in _named(paths, columns).items():
            Arguments(name).dtype(what, x)
    return array_module(name, **dict(zip(columns, arrays[:1], strict=False)))


def _named(paths: list[str], columns: dict[str, list[Any]]) -> dict[str, Any]:
    pairs = [(what, path, x) for what, column in columns.items() for path, x in zip(paths, column, strict=True)]
    return {f"{what}[{path!r}]": x for what, path, x in pairs if x is not None}


def _on_one_gpu(kinds: set[type], arrays: list[Any]) -> bool:
    """Tell whether all are CuPy's and of one device: then one of them stands for all."""
    if len(kinds) != 1 or not is_array(arrays[0]) or isinstance(arrays[0], np.ndarray):
        return False
    return len({x.data.device_id for x in arrays}) == 1


def same_shapes(name: str, what: str, paths: list[str], leaves: list[Any], params: list[Any]) -> None:
    """Raise ValueError unless every one of `leaves` has its parameter's shape."""
    for path, leaf, param in zip(paths, leaves, params, strict=True):
        if getattr(leaf, "shape", None) != param.shape:
            came = f"shape {leaf.shape}" if hasattr(leaf, "shape") else type(leaf).__name__
            raise ValueError(f"{name}: {what} of {path} must have shape {param.shape}, got {came}")
