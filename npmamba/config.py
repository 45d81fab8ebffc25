"""The sizes and options of a Mamba language model, and the one table of its parameters' names and shapes.

`MambaConfig` checks itself when it is made, before anything is allocated. How it is spelt in files stands in
``config_names.py``.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from npmamba import config_names
from npmamba.config_names import TOKENS, check_options, wrong

# 400 GB in float32: more is a slip of the pen or a hostile file, not a model.
MAX_PARAMETERS = 10**11

_INTEGERS = {
    "vocab_size": (1, 2**31 - 1),
    "d_model": (1, 2**20),
    "n_layer": (1, 2**14),
    "d_state": (1, 256),
    "d_conv": (1, 256),
    "pad_vocab_size_multiple": (1, 2**20),
}
_Range = tuple[Callable[[float], bool], str]
_POSITIVE: _Range = (lambda x: x > 0, "a number above 0")
_NOT_NEGATIVE: _Range = (lambda x: x >= 0, "a number that is at least 0")
_NUMBERS: dict[str, _Range] = {
    "expand": (lambda x: 0 < x <= 1024, "a number above 0 and at most 1024"),
    **dict.fromkeys(("dt_min", "dt_max", "dt_scale", "dt_init_floor"), _POSITIVE),
    **dict.fromkeys(("norm_eps", "initializer_range"), _NOT_NEGATIVE),
    "dropout": (lambda x: 0 <= x < 1, "a number from 0 up to, not including, 1"),
}
_FLAGS = ("conv_bias", "bias", "tie_embeddings", "residual_in_fp32", "rescale_prenorm_residual")
_CHOICES = {"dt_init": ("random", "constant"), "discretization": ("euler", "zoh")}


@dataclass(frozen=True)
class MambaConfig:
    """The sizes and options of a Mamba language model.

    Parameters
    ----------
    vocab_size : int
        Number of tokens. The embedding has `padded_vocab_size` rows: `vocab_size` rounded up to a multiple of
        `pad_vocab_size_multiple`.
    d_model : int
        Width of the residual stream.
    n_layer : int
        Number of blocks.
    d_state : int, default 16
        States per channel, 1 to 256.
    d_conv : int, default 4
        Taps of the causal convolution.
    expand : float, default 2
        ``d_inner = int(expand * d_model)``.
    dt_rank : int or "auto", default "auto"
        Rank of the step size's projection; ``"auto"`` becomes ``ceil(d_model / 16)`` at once.
    dt_min, dt_max, dt_init, dt_scale, dt_init_floor
        Initialization of the step size, as published: log-uniform between `dt_min` and `dt_max`, at least
        `dt_init_floor`; `dt_init` is ``"random"`` or ``"constant"``.
    conv_bias, bias : bool
        Whether the convolution, and the in and out projections, have a bias.
    norm_eps : float, default 1e-5
        Added to the mean square in RMS normalization.
    tie_embeddings : bool, default True
        Whether the embedding is also the output projection.
    discretization : {"euler", "zoh"}
        Published checkpoints need ``"euler"``.
    dropout : float, default 0
        Share of values dropped in training, in [0, 1).
    initializer_range : float, default 0.02
        Standard deviation of the initial embedding.
    rescale_prenorm_residual : bool, default True
        Whether the initial out projections are divided by ``sqrt(n_layer)``.
    residual_in_fp32 : bool, default True
        Kept for the file's sake.
    bos_token_id, eos_token_id, pad_token_id : int, optional
        Special tokens.
    pad_vocab_size_multiple : int, default 1
        See `vocab_size`; 8 in the original checkpoints.

    Raises
    ------
    TypeError
        If an option has the wrong type, or no such option exists (the nearest one is named).
    ValueError
        If a value is out of range, or the whole would have more than 10**11 parameters.

    Examples
    --------
    >>> config = MambaConfig(vocab_size=50277, d_model=768, n_layer=24, pad_vocab_size_multiple=8)
    >>> config.d_inner, config.dt_rank, config.padded_vocab_size
    (1536, 48, 50280)
    >>> config.parameter_count()
    129135360
    >>> MambaConfig(vocab_size=65, d_modle=64, n_layer=2)
    Traceback (most recent call last):
        ...
    TypeError: MambaConfig: unknown option 'd_modle'; did you mean 'd_model'?
    """

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 16
    d_conv: int = 4
    expand: float = 2
    dt_rank: int = "auto"  # type: ignore[assignment]  # readers always see the integer that __post_init__ puts here
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init: str = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    discretization: str = "euler"
    dropout: float = 0.0
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    residual_in_fp32: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    pad_vocab_size_multiple: int = 1

    def __new__(cls, *args: Any, **options: Any) -> MambaConfig:
        """Refuse unknown options by name: the message of the generated ``__init__`` offers no help."""
        check_options("MambaConfig", options, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            self._put(name, _integer(name, getattr(self, name), low, high))
        for name, (allowed, expected) in _NUMBERS.items():
            self._put(name, _number(name, getattr(self, name), allowed, expected))
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise wrong(TypeError, name, getattr(self, name), "True or False")
        for name, choices in _CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise wrong(ValueError, name, getattr(self, name), " or ".join(map(repr, choices)))
        self._check_together()

    def _check_together(self) -> None:
        rank: Any = self.dt_rank
        if isinstance(rank, str) and rank == "auto":
            rank = math.ceil(self.d_model / 16)
        self._put("dt_rank", _integer("dt_rank", rank, 1, 2**20))
        if self.dt_min > self.dt_max:
            raise wrong(ValueError, "dt_min", self.dt_min, f"at most dt_max={self.dt_max}")
        if self.d_inner < 1:
            raise wrong(ValueError, "expand", self.expand, f"at least 1 / d_model = 1 / {self.d_model}")
        for name in TOKENS:
            if getattr(self, name) is not None:
                self._put(name, _integer(name, getattr(self, name), 0, self.padded_vocab_size - 1))
        if self.parameter_count() > MAX_PARAMETERS:
            sizes = f"vocab_size={self.vocab_size}, d_model={self.d_model}, n_layer={self.n_layer}"
            raise ValueError(
                f"MambaConfig: {sizes}, expand={self.expand} make {self.parameter_count():,} parameters; "
                f"expected at most {MAX_PARAMETERS:,}"
            )

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def d_inner(self) -> int:
        """Number of channels inside a block, ``int(expand * d_model)``; `dim` in the operations."""
        return int(self.expand * self.d_model)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `pad_vocab_size_multiple`."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one block's parameters, by the key's part after ``backbone.layers.<i>.``."""
        inner, model, rank, state = self.d_inner, self.d_model, self.dt_rank, self.d_state
        shapes: dict[str, tuple[int, ...] | None] = {
            "norm.weight": (model,),
            "mixer.in_proj.weight": (2 * inner, model),
            "mixer.in_proj.bias": (2 * inner,) if self.bias else None,
            "mixer.conv1d.weight": (inner, 1, self.d_conv),
            "mixer.conv1d.bias": (inner,) if self.conv_bias else None,
            "mixer.x_proj.weight": (rank + 2 * state, inner),
            "mixer.dt_proj.weight": (inner, rank),
            "mixer.dt_proj.bias": (inner,),
            "mixer.A_log": (inner, state),
            "mixer.D": (inner,),
            "mixer.out_proj.weight": (model, inner),
            "mixer.out_proj.bias": (model,) if self.bias else None,
        }
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every parameter's shape by its checkpoint key, in the order of the forward pass.

        Initialization, loading and checks share this table.

        Examples
        --------
        >>> shapes = MambaConfig(vocab_size=65, d_model=32, n_layer=1).parameter_shapes()
        >>> shapes["backbone.embeddings.weight"], shapes["backbone.layers.0.mixer.conv1d.weight"]
        ((65, 32), (64, 1, 4))
        """
        table, layer = (self.padded_vocab_size, self.d_model), self.layer_shapes()
        shapes: dict[str, tuple[int, ...]] = {"backbone.embeddings.weight": table}
        for i in range(self.n_layer):
            shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["backbone.norm_f.weight"] = (self.d_model,)
        return shapes if self.tie_embeddings else shapes | {"lm_head.weight": table}

    def parameter_count(self) -> int:
        """Return the number of parameters; tied embeddings count once."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MambaConfig:
        """Read a configuration in the names of Hugging Face or of the original state-spaces files.

        What a file leaves out has the default of its own format: Hugging Face's ``use_bias`` is True, the
        original ``vocab_size`` 50277 is padded to a multiple of 8. Unknown keys are ignored unless they look
        like a misspelt known one.

        Raises
        ------
        TypeError, ValueError
            If the file describes a model that npmamba cannot run (another ``model_type`` or activation,
            attention layers, LayerNorm, quantized weights), contradicts itself, or has a value out of range.

        Examples
        --------
        >>> original = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
        >>> config = MambaConfig.from_dict(original)
        >>> config.vocab_size, config.padded_vocab_size
        (50277, 50280)
        >>> MambaConfig.from_dict(config.to_dict()) == config
        True
        """
        names = [field.name for field in fields(cls)]
        config = cls(**config_names.read(data, names))
        config_names.refuse_contradictions(config, data, names)
        return config

    def to_dict(self, dtype: str = "float32") -> dict[str, Any]:
        """Return the configuration in Hugging Face's names, with ``"npmamba"`` for what has no name there.

        Parameters
        ----------
        dtype : str, default "float32"
            The type of the stored weights, written as ``torch_dtype``.
        """
        return config_names.write(self, dtype)

    @classmethod
    def from_json(cls, text: str) -> MambaConfig:
        """Read the text of a ``config.json``; see `from_dict`."""
        if not isinstance(text, str | bytes | bytearray):
            raise TypeError(f"MambaConfig.from_json: text must be a string, got {type(text).__name__}")
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"MambaConfig.from_json: not valid JSON: {error}") from None
        return cls.from_dict(data)

    def to_json(self, dtype: str = "float32") -> str:
        """Return the text of a ``config.json``; see `to_dict`."""
        return json.dumps(self.to_dict(dtype), indent=2) + "\n"


def _integer(name: str, value: Any, low: int, high: int) -> int:
    expected = f"an integer from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(TypeError, name, value, expected)
    if not low <= int(value) <= high:
        raise wrong(ValueError, name, value, expected)
    return int(value)


def _number(name: str, value: Any, allowed: Callable[[Any], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(TypeError, name, value, expected)
    # An integer beyond float64 must not reach float(); a comparison with NaN is False.
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if not (allowed(number) and number <= 1e300):
        raise wrong(ValueError, name, value, expected)
    return number
