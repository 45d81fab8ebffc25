"""Trees of arrays: dicts, lists and tuples, nested as deep as one likes, with arrays as leaves.

Parameters, gradients and optimizer states are trees. None is an empty branch. The path of a leaf joins its
keys with dots, so in a flat dict of parameters it is the checkpoint key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _branches(tree: Any) -> dict[Any, Any] | None:
    """Return the branches of `tree` by key, or None if `tree` is a leaf."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return dict(zip(tree._fields, tree, strict=True))
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    return tree if isinstance(tree, dict) else None


def tree_map_path(f: Callable[..., Any], tree: Any, *others: Any, path: str = "") -> Any:
    """Return the tree of ``f(path, leaf, *leaves of others)``.

    In `others` None may stand for a whole branch; keys that differ from those of `tree` are a ValueError.

    >>> tree_map_path(lambda path, x: f"{path}={x}", {"norm": {"weight": 1}, "layers": [2, None]})
    {'norm': {'weight': 'norm.weight=1'}, 'layers': ['layers.0=2', None]}
    """
    if tree is None or (branches := _branches(tree)) is None:
        return None if tree is None else f(path, tree, *others)
    columns = [dict.fromkeys(branches) if other is None else _branches(other) or {} for other in others]
    for column in columns:
        if column.keys() != branches.keys():
            raise ValueError(f"trees differ at {path or 'the root'}: {list(branches)} against {list(column)}")
    values = [
        tree_map_path(f, branch, *(column[key] for column in columns), path=f"{path}.{key}".lstrip("."))
        for key, branch in branches.items()
    ]
    if isinstance(tree, dict):
        return dict(zip(tree, values, strict=True))
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def tree_map(f: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return the tree of ``f(leaf, *leaves of others)``.

    >>> tree_map(lambda x, y: x + y, {"a": 1, "b": (2, None)}, {"a": 10, "b": (20, None)})
    {'a': 11, 'b': (22, None)}
    """
    return tree_map_path(lambda _, *leaves: f(*leaves), tree, *others)


def tree_items(tree: Any) -> list[tuple[str, Any]]:
    """Return ``(path, leaf)`` for every leaf, in order.

    >>> tree_items({"step": 3, "m": {"norm_f.weight": 4.0}})
    [('step', 3), ('m.norm_f.weight', 4.0)]
    """
    items: list[tuple[str, Any]] = []
    tree_map_path(lambda path, leaf: items.append((path, leaf)), tree)
    return items
