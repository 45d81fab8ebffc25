"""Training runs on disk: everything that resuming needs, in one file that one rename replaces.

A process killed at any moment leaves the previous checkpoint or the new one, complete. The arrays of
parameters, optimizer state and the rest lie in a safetensors file as ``params.<key>``, ``optimizer.m.<key>``
and so on; the trees they came from stand in its metadata.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npmamba.config import MambaConfig
from npmamba.tensorfile import TensorFile, save_tensors

TRAINING_FILE = "checkpoint.safetensors"


class TrainingState(NamedTuple):
    """What `save_training` was given."""

    step: int
    config: MambaConfig
    params: Any
    opt_state: Any
    extra: Any


def save_training(
    folder: str | os.PathLike[str],
    step: int,
    config: MambaConfig,
    params: Any,
    opt_state: Any,
    extra: Any = None,
) -> None:
    """Write a training run's whole state to one file, ``checkpoint.safetensors`` in `folder`, by one rename.

    Parameters
    ----------
    folder : path
        Created if need be.
    step : int
        Steps done.
    config : MambaConfig
    params, opt_state, extra : trees
        Dicts with string keys, lists, tuples and named tuples of arrays, numbers, strings, booleans and None;
        the state of a NumPy random generator is one. Arrays keep dtype, shape and bits.

    Raises
    ------
    TypeError
        If a leaf is something else, naming its place.
    OSError
        If the file cannot be written; the earlier checkpoint stands.
    """
    tensors: dict[str, Any] = {}
    trees = {"params": params, "optimizer": opt_state, "extra": extra}
    packed = {name: _pack(tree, name, tensors) for name, tree in trees.items()}
    content = {"version": 1, "step": int(step), "config": config.to_dict(), "trees": packed}
    os.makedirs(folder, exist_ok=True)
    save_tensors(Path(folder) / TRAINING_FILE, tensors, {"npmamba": json.dumps(content)})


def load_training(folder: str | os.PathLike[str], like: Any = None) -> TrainingState:
    """Read what `save_training` wrote.

    Parameters
    ----------
    folder : path
    like : tree, optional
        An optimizer state of the expected structure, such as a fresh one: the loaded state takes its named
        tuples. Without it, named tuples come back as dicts.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If the file is damaged, or the optimizer's state has another structure than `like`.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> config = MambaConfig(vocab_size=8, d_model=4, n_layer=1)
    >>> params, opt_state = {"w": np.ones(2)}, {"m": {"w": np.zeros(2)}, "count": 7}
    >>> save_training(folder, 7, config, params, opt_state, {"seed": 1})
    >>> state = load_training(folder)
    >>> state.step, state.opt_state["m"]["w"].tolist(), state.extra
    (7, [0.0, 0.0], {'seed': 1})
    """
    state = TrainingState(*_read_state(folder, ("params", "optimizer", "extra")))
    return state if like is None else state._replace(opt_state=_restore(like, state.opt_state, "opt_state"))


def load_params(folder: str | os.PathLike[str]) -> tuple[MambaConfig, Any]:
    """Read no more than the config and the parameters of a training checkpoint; see `load_training`."""
    return _read_state(folder, ("params",))[1:]


def has_training(folder: str | os.PathLike[str]) -> bool:
    """Tell whether `folder` holds a training checkpoint."""
    return (Path(folder) / TRAINING_FILE).is_file()


def _read_state(folder: str | os.PathLike[str], names: tuple[str, ...]) -> Any:
    if not has_training(folder):
        raise FileNotFoundError(f"{folder} has no {TRAINING_FILE}, so there is no training to resume")
    with TensorFile(Path(folder) / TRAINING_FILE) as file:
        try:
            content = json.loads(file.metadata["npmamba"])
            step, config = content["step"], MambaConfig.from_dict(content["config"])
            if type(step) is not int:
                raise TypeError(f"its step is {step!r}")
            trees = [content["trees"][name] for name in names]
        except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
            raise _no_checkpoint(file, error) from None
        try:
            return (step, config, *(_unpack(tree, file) for tree in trees))
        except (TypeError, AttributeError, RecursionError) as error:  # a ValueError has the file's name
            raise _no_checkpoint(file, error) from None


def _no_checkpoint(file: TensorFile, error: Exception) -> ValueError:
    return ValueError(f"{file.path}: no training checkpoint: {type(error).__name__}: {error}")


def _pack(tree: Any, place: str, tensors: dict[str, Any]) -> Any:
    """Move the arrays of `tree` to `tensors` and return its structure as JSON: a one-key dict at every node.

    >>> tensors = {}
    >>> _pack({"m": [np.zeros(3)], "count": 2}, "optimizer", tensors)
    {'dict': {'m': {'list': [{'array': 'optimizer.m.0'}]}, 'count': {'value': 2}}}
    >>> list(tensors)
    ['optimizer.m.0']
    """
    if isinstance(tree, bool | int | float | str | None) and not isinstance(tree, np.generic):
        return {"value": tree}
    branches = named_branches(tree)
    if branches is not None:
        if not all(isinstance(key, str) for key in branches):
            raise TypeError(f"save_training: {place} has keys that are not strings: {list(branches)[:5]}")
        return {"dict": {key: _pack(value, f"{place}.{key}", tensors) for key, value in branches.items()}}
    if isinstance(tree, list | tuple):
        nodes = [_pack(value, f"{place}.{i}", tensors) for i, value in enumerate(tree)]
        return {"list" if isinstance(tree, list) else "tuple": nodes}
    if not hasattr(tree, "dtype"):
        raise TypeError(f"save_training: {place} is a {type(tree).__name__}; expected arrays, numbers, strings")
    while place in tensors:  # {"a.b": x, "a": {"b": y}} has two arrays of one name
        place += "'"
    tensors[place] = tree
    return {"array": place}


def _unpack(node: Any, file: TensorFile) -> Any:
    if len(node) != 1:
        raise TypeError(f"a node of a tree is of {len(node)} kinds")
    ((kind, content),) = node.items()
    if kind == "array":
        return file.read(content)
    if kind == "dict":
        return {key: _unpack(value, file) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [_unpack(value, file) for value in content]
        return values if kind == "list" else tuple(values)
    if kind == "value" and (content is None or isinstance(content, bool | int | float | str)):
        return content
    raise TypeError(f"a tree has no {kind!r}")


def _restore(like: Any, tree: Any, place: str) -> Any:
    """Give `tree` the named tuples of `like`, and say where the two differ."""
    branches = named_branches(like)
    if branches is not None:
        if not isinstance(tree, dict) or tree.keys() != branches.keys():
            raise _differs(place, list(tree) if isinstance(tree, dict) else _kind(tree), list(branches))
        # In the order of the file, so that what sums over a dict does so as before.
        restored = {key: _restore(branches[key], value, f"{place}.{key}") for key, value in tree.items()}
        return restored if isinstance(like, dict) else type(like)(**restored)
    if _kind(tree) != _kind(like):
        raise _differs(place, _kind(tree), _kind(like))
    if isinstance(like, list | tuple):
        values = enumerate(zip(like, tree, strict=True))
        return type(like)(_restore(old, new, f"{place}.{i}") for i, (old, new) in values)
    return tree


def _kind(value: Any) -> str:
    """Say in a word what two trees must agree on at a leaf, or at a list."""
    if hasattr(value, "dtype"):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return "a number" if isinstance(value, int | float) else type(value).__name__


def _differs(place: str, came: Any, expected: Any) -> ValueError:
    return ValueError(f"load_training: {place} has {came}; expected {expected}")


def named_branches(tree: Any) -> dict[str, Any] | None:
    """Return the branches of a dict or a named tuple, None for anything else."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return dict(zip(tree._fields, tree, strict=True))
    return tree if isinstance(tree, dict) else None
