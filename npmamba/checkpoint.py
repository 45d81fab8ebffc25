"""Models and training runs on disk.

`save_model` and `load_model` speak Hugging Face's layout: ``config.json`` beside ``model.safetensors``, with
the keys and shapes of `MambaConfig.parameter_shapes`. Whole training runs are kept by ``training_state.py``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from npmamba.backend import on_host
from npmamba.config import MambaConfig
from npmamba.files import atomic_write, load_json, save_json_atomic
from npmamba.shapes import FLOATS, HALF
from npmamba.tensorfile import TensorFile, encode, load_tensors, save_tensors
from npmamba.training_state import TrainingState, has_training, load_params, load_training, save_training

__all__ = [
    "TrainingState", "load_config", "load_model", "load_tensors", "load_training", "save_json_atomic",
    "save_model", "save_tensors", "save_training",
]  # fmt: skip

# These enter the scan as A, D and delta_bias, which stay float32 beside half-precision activations.
KEPT_FLOAT32 = ("mixer.A_log", "mixer.D", "mixer.dt_proj.bias")
# What the operations take in float32 beside half-precision activations.
RUN_IN_FLOAT32 = (*KEPT_FLOAT32, "norm.weight", "norm_f.weight", "conv1d.weight", "conv1d.bias")
_EMBEDDING, _HEAD = "backbone.embeddings.weight", "lm_head.weight"
_CONVERT = """python -c "import torch, safetensors.torch as s
w = torch.load('pytorch_model.bin', map_location='cpu', weights_only=True)
s.save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors')\""""


def load_config(folder: str | os.PathLike[str]) -> MambaConfig:
    """Read the ``config.json`` in `folder`.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        If it is missing or describes no model that npmamba runs; the file is named.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. npmamba does not download models; fetch the files of a published one "
            "with: hf download state-spaces/mamba-130m-hf --local-dir mamba-130m-hf"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    data = load_json(path)
    try:
        return MambaConfig.from_dict(data)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from None


def save_model(
    folder: str | os.PathLike[str], config: MambaConfig, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Write a model as transformers' ``MambaForCausalLM.from_pretrained`` reads it.

    Parameters
    ----------
    folder : path
        Created if need be.
    config : MambaConfig
    params : dict of str to array
        All parameters of ``config.parameter_shapes()``.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Type to store; by default each array's own. In half precision, ``A_log``, ``D`` and the bias of the
        step size stay float32.

    Raises
    ------
    ValueError
        If `params` are not those of `config`, or a value is too large for `dtype`.
    OSError
        If something cannot be written; an earlier model in the folder stands.
    """
    _check(f"save_model: {folder}", config, {name: tuple(array.shape) for name, array in params.items()})
    tensors = {name: _cast(name, on_host(array), dtype) for name, array in params.items()}
    content = encode(tensors, {"format": "pt"})
    stored = tensors[_EMBEDDING].dtype.name
    os.makedirs(folder, exist_ok=True)
    # Both are written before either gets its name, so they part only if the machine dies between two renames.
    with ExitStack() as files:
        write_config = files.enter_context(atomic_write(Path(folder) / "config.json"))
        write_weights = files.enter_context(atomic_write(Path(folder) / "model.safetensors"))
        write_config(config.to_json(stored).encode())
        write_weights(content)


def load_model(folder: str | os.PathLike[str], dtype: Any = None) -> tuple[MambaConfig, dict[str, np.ndarray]]:
    """Read a model: one that `save_model` or transformers wrote, a converted original, or a training run.

    Keys and shapes are checked before any weight is read. The original spelling ``backbone.embedding.weight``
    is accepted, and so is an ``lm_head.weight`` that repeats tied embeddings.

    Parameters
    ----------
    folder : path
        Holds ``config.json`` with ``model.safetensors`` or its shards, or a training checkpoint.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        Type of the result; by default float32 for half-precision weights and the stored type otherwise. In
        half precision, ``A_log``, ``D`` and the bias of the step size are float32.

    Returns
    -------
    config : MambaConfig
    params : dict of str to ndarray
        In the order of ``config.parameter_shapes()``.

    Raises
    ------
    FileNotFoundError
        If there is no model, or only one in a format that can run code (``.bin``): how to convert it is said.
    ValueError
        If keys are missing or unexpected, or shapes are wrong: all are listed.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> config = MambaConfig(vocab_size=8, d_model=4, n_layer=1)
    >>> params = {key: np.ones(shape, np.float16) for key, shape in config.parameter_shapes().items()}
    >>> save_model(folder, config, params)
    >>> config2, params2 = load_model(folder)
    >>> config2 == config, params2["backbone.norm_f.weight"].dtype
    (True, dtype('float32'))
    """
    if not _weights_in(Path(folder)) and has_training(folder):
        config, params = load_params(folder)
        _check(str(folder), config, {key: x.shape for key, x in params.items()})
        return config, {key: _cast(key, params[key], _wanted(params[key].dtype, dtype)) for key in params}
    config = load_config(folder)
    with ExitStack() as stack:
        found = _find(stack.enter_context(TensorFile(path)) for path in _weight_files(Path(folder)))
        shapes = {key: file.shapes[name] for key, (file, name) in found.items()}
        _check(str(folder), config, shapes, (_HEAD,) if config.tie_embeddings else ())
        if _HEAD in found and config.tie_embeddings:
            _check_tied(str(folder), found)
        return config, {key: _read(key, *found[key], dtype) for key in config.parameter_shapes()}


def _weights_in(root: Path) -> Path | None:
    names = ("model.safetensors", "model.safetensors.index.json")
    return next((root / name for name in names if (root / name).is_file()), None)


def _weight_files(root: Path) -> list[Path]:
    weights = _weights_in(root)
    if weights is not None:
        return [weights] if weights.suffix == ".safetensors" else _shards(weights)
    pickles = sorted([*root.glob("*.bin"), *root.glob("*.pt"), *root.glob("*.pth")])
    if pickles:
        raise FileNotFoundError(
            f"{root} has {pickles[0].name}, but no model.safetensors. Opening such a file can run code, so "
            f"npmamba never does. Convert it once, in that folder, where PyTorch is installed:\n{_CONVERT}"
        )
    raise FileNotFoundError(f"{root} has no model.safetensors")


def _shards(index: Path) -> list[Path]:
    data = load_json(index)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: has no weight_map from tensors to files")
    shards = {}
    for name in names.values():
        # A name with a folder in it would let a downloaded index point at any file of this machine.
        plain = isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:\0")
        if not plain:
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        shards[name] = index.parent / name
    return [shards[name] for name in sorted(shards)]


def _find(files: Iterable[TensorFile]) -> dict[str, tuple[TensorFile, str]]:
    """Say for each key, in our spelling, which file holds it under which name."""
    found: dict[str, tuple[TensorFile, str]] = {}
    for file in files:
        for name in file.shapes:
            key = _EMBEDDING if name == "backbone.embedding.weight" else name
            if key in found:
                raise ValueError(f"{file.path}: {name} stands in {found[key][0].path} too, as {found[key][1]}")
            found[key] = (file, name)
    return found


def _check(where: str, config: MambaConfig, shapes: Mapping[str, tuple[int, ...]], tied: tuple[str, ...] = ()) -> None:
    """Raise one ValueError that lists every missing, unexpected and misshapen parameter."""
    expected = config.parameter_shapes()
    missing = [key for key in expected if key not in shapes]
    problems = [f"missing {key} {expected[key]}" for key in missing]
    expected |= {key: expected[_EMBEDDING] for key in tied}
    for key, shape in shapes.items():
        if key not in expected:
            near = difflib.get_close_matches(key, missing, 1)
            problems.append(f"unexpected {key} {shape}" + (f", did you mean {near[0]}?" if near else ""))
        elif shape != expected[key]:
            problems.append(f"{key} has shape {shape}; expected {expected[key]}")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = "\n  ".join(problems[:20])
        raise ValueError(f"{where}: the weights do not fit the config:\n  {lines}{more}")


def _check_tied(where: str, found: Mapping[str, tuple[TensorFile, str]]) -> None:
    a, b = (file.read(name) for file, name in (found[_EMBEDDING], found[_HEAD]))
    if a.dtype != b.dtype or not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
        raise ValueError(
            f"{where}: config.json ties the embeddings, but {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false"
        )


def _read(key: str, file: TensorFile, name: str, dtype: Any) -> np.ndarray:
    array = file.read(name)
    if array.dtype.name not in FLOATS:
        raise ValueError(f"{file.path}: {name} has dtype {array.dtype}; expected one of {', '.join(FLOATS)}")
    return _cast(key, array, _wanted(array.dtype, dtype))


def _wanted(stored: np.dtype, dtype: Any) -> Any:
    return dtype if dtype is not None else ("float32" if stored.name in HALF else stored)


def _cast(key: str, array: Any, dtype: Any) -> Any:
    if dtype is None:
        return array
    wanted = _float_dtype(dtype)
    if wanted.name in HALF and key.endswith(KEPT_FLOAT32):
        wanted = np.dtype(np.float32)
    with np.errstate(over="ignore"):
        cast = array.astype(wanted, copy=False)
    # Only where the new type reaches less far can a finite value have become infinite.
    if wanted.itemsize < array.dtype.itemsize and (np.isinf(cast) & ~np.isinf(array)).any():
        raise ValueError(f"{key} has values beyond the largest {wanted}; use bfloat16 or float32")
    return cast


def in_half(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return float32 parameters as a model in half precision runs with them: matrices and biases in `dtype`.

    Raises
    ------
    ValueError
        If a value is too large for `dtype`.
    """
    return {key: x if key.endswith(RUN_IN_FLOAT32) else _cast(key, x, dtype) for key, x in params.items()}


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = None
    if wanted is None or wanted.name not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, got {dtype!r}")
    return wanted
