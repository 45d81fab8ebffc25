"""How a model's configuration is spelt in files: Hugging Face's names, and those of the original repository.

The published ``-hf`` files carry both vocabularies, so what is said twice is compared. What would make
another model than npmamba runs (attention layers, LayerNorm, Mamba-2) is refused here, by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAME = ("expand", "initializer_range", "residual_in_fp32", "rescale_prenorm_residual", *TOKENS)

# vocab_size is apart, because Hugging Face counts the padding rows.
HUGGING_FACE = {
    "d_model": "hidden_size",
    "n_layer": "num_hidden_layers",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "dt_rank": "time_step_rank",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
    "dt_init_floor": "time_step_floor",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
    **{name: name for name in _SAME},
}
_HUGGING_FACE_DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_layer": 32,
    "bias": True,
    "initializer_range": 0.1,
    "rescale_prenorm_residual": False,
    **dict.fromkeys(TOKENS, 0),
}
_ORIGINAL_DEFAULTS = {"vocab_size": 50277, "d_model": 2560, "n_layer": 64, "pad_vocab_size_multiple": 8}
_SSM = (
    "d_state", "d_conv", "expand", "conv_bias", "bias",
    "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
)  # fmt: skip
_OURS = ("vocab_size", "pad_vocab_size_multiple", "discretization", "dropout", "rescale_prenorm_residual")
# What a file may say and npmamba can do.
_HONOURED: dict[str, tuple[Any, ...]] = {
    "model_type": ("mamba",),
    "hidden_act": ("silu", "swish"),
    "rms_norm": (True,),
    "attn_layer_idx": ([], None),
    "d_intermediate": (0, None),
    "quantization_config": (None,),
}
_OTHERS = ("ssm_cfg", "attn_cfg", "d_inner", "intermediate_size", "npmamba", "norm_epsilon")
# Harmless, and near enough to a known key to be taken for a slip.
_METADATA = {"bos_token", "eos_token", "pad_token", "sep_token_id", "decoder_start_token_id", "num_layers"}


def check_options(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for the first name in `given` that is not in `known`, naming the nearest known one.

    Examples
    --------
    >>> check_options("train", ["learning_rat"], ["learning_rate", "steps"])
    Traceback (most recent call last):
        ...
    TypeError: train: unknown option 'learning_rat'; did you mean 'learning_rate'?
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"{where}: unknown option {name!r}; {hint}")


def wrong(kind: type[Exception], name: str, value: Any, expected: str) -> Exception:
    """Return the error that says what `name` holds and what was expected of it."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no repr
        shown = "a value too long to show"
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return kind(f"MambaConfig: {name}={shown}; expected {expected}")


def read(data: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the options of `MambaConfig`, whose fields are `names`, that the file content `data` means."""
    if not isinstance(data, Mapping):
        raise TypeError(f"MambaConfig: expected a dictionary of options, got {type(data).__name__}")
    _refuse_misspelt(data, names)
    _refuse_other_models(data)
    if "model_type" in data or data.keys() & (set(HUGGING_FACE.values()) - set(_SAME)):
        return _from_hugging_face(data)
    if data.keys() & {"d_model", "n_layer"}:
        return _from_original(data, names)
    raise ValueError("MambaConfig: neither Hugging Face's names (hidden_size) nor the original (d_model)")


def write(config: Any, dtype: str) -> dict[str, Any]:
    """Return `config` as transformers' ``MambaForCausalLM`` reads it, our own options under ``"npmamba"``."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": config.padded_vocab_size,
        **{theirs: getattr(config, ours) for ours, theirs in HUGGING_FACE.items()},
        "intermediate_size": config.d_inner,
        "hidden_act": "silu",
        "rescale_prenorm_residual": False,  # transformers would rescale the weights it loads, see _OURS
        "torch_dtype": dtype,
        "npmamba": {name: getattr(config, name) for name in _OURS},
    }


def refuse_contradictions(config: Any, data: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError where `data` says something twice, and not the same."""
    rows = config.padded_vocab_size if "npmamba" in data else config.vocab_size
    said = {name: getattr(config, name) for name in names if name not in _OURS}
    said |= {"vocab_size": rows, "d_inner": config.d_inner, "intermediate_size": config.d_inner}
    ssm = {f"ssm_cfg.{name}": value for name, value in _ssm(data).items() if name in said}
    for name, value in [*data.items(), *ssm.items()]:
        meant = said.get(name.removeprefix("ssm_cfg."), value)
        if value not in (meant, "auto"):
            raise wrong(ValueError, name, value, f"{meant}, which is what the rest of the file makes it")


def _ssm(data: Mapping[str, Any]) -> Mapping[str, Any]:
    ssm = data.get("ssm_cfg") or {}
    if not isinstance(ssm, Mapping):
        raise wrong(TypeError, "ssm_cfg", ssm, "a dictionary")
    return ssm


def _refuse_misspelt(data: Mapping[str, Any], names: list[str]) -> None:
    known = sorted({*names, *HUGGING_FACE.values(), *_HONOURED, *_OTHERS})
    for key in data:
        if not isinstance(key, str):
            raise TypeError(f"MambaConfig: keys must be strings, got {key!r}")
        near = [] if key in _METADATA or key in known else difflib.get_close_matches(key, known, 1, 0.84)
        if near:
            raise ValueError(f"MambaConfig: unknown key {key!r}; did you mean {near[0]!r}?")


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    for name, allowed in _HONOURED.items():
        if name in data and data[name] not in allowed:
            raise wrong(ValueError, name, data[name], f"{allowed[0]!r}: npmamba runs Mamba-1 models only")
    layer = _ssm(data).get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba"):
        raise wrong(ValueError, "ssm_cfg.layer", layer, "'Mamba1': npmamba runs Mamba-1 models only")


def _from_hugging_face(data: Mapping[str, Any]) -> dict[str, Any]:
    said = {ours: data[theirs] for ours, theirs in HUGGING_FACE.items() if theirs in data}
    options = _HUGGING_FACE_DEFAULTS | said
    # Hugging Face documents "uniform" for the draw that its code, like the original, calls "random".
    if options.get("dt_init") == "uniform":
        options["dt_init"] = "random"
    ours = data.get("npmamba", {})
    if not isinstance(ours, Mapping):
        raise wrong(TypeError, "npmamba", ours, "a dictionary")
    check_options("MambaConfig: npmamba", ours, _OURS)
    return options | {"vocab_size": data.get("vocab_size", 50280)} | dict(ours)


def _from_original(data: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    ssm = {name: value for name, value in _ssm(data).items() if name not in ("layer", "use_fast_path")}
    check_options("MambaConfig: ssm_cfg", ssm, _SSM)
    options = _ORIGINAL_DEFAULTS | {name: data[name] for name in names if name in data} | ssm
    return options | ({"norm_eps": data["norm_epsilon"]} if "norm_epsilon" in data else {})
