"""The Mamba language model: embedding, blocks with residuals, norm, and a head that gives logits.

Parameters are a plain dictionary from checkpoint keys to arrays. The functions here work on arrays and on values that
the tape records alike; `MambaLM` joins parameters and configuration for those who prefer an object.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from npmamba.autodiff import value_and_grad
from npmamba.autodiff.algebra import astype, dropout, linear
from npmamba.backend import array_module
from npmamba.block import BlockState, mamba_block, mamba_block_step
from npmamba.config import MambaConfig
from npmamba.cuda.requirements import require_device
from npmamba.initialize import init_params
from npmamba.ops.cross_entropy import cross_entropy
from npmamba.ops.embedding import embedding
from npmamba.ops.rms_norm import rms_norm
from npmamba.shapes import FLOATS, HALF, compute_dtype

__all__ = ["MambaLM", "init_params", "init_state", "logits", "loss", "next_token_labels", "prefill", "step"]

Params = Mapping[str, Any]
State = list[BlockState]


def _layers(params: Params, config: MambaConfig) -> list[dict[str, Any]]:
    """Return each layer's parameters by the part of their keys after ``backbone.layers.<i>.``."""
    names = config.layer_shapes()
    return [{name: params[f"backbone.layers.{i}.{name}"] for name in names} for i in range(config.n_layer)]


def _mixer(layer: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("mixer."): p for name, p in layer.items() if name.startswith("mixer.")}


def _hidden(
    params: Params,
    config: MambaConfig,
    input_ids: Any,
    *,
    state: State | None = None,
    dropout_key: tuple[int, ...] | None = None,
    seq_idx: Any = None,
    observe: Callable[..., None] | None = None,
) -> tuple[Any, State]:
    """Return the normalized last hidden values (batch, seqlen, d_model) and the state of every block."""
    hidden = embedding(params["backbone.embeddings.weight"], input_ids)
    residual, new_state = None, []
    for i, layer in enumerate(_layers(params, config)):
        normed, residual = _add_norm(hidden, residual, layer["norm.weight"], config)
        hidden, block_state = mamba_block(
            _mixer(layer),
            normed,
            config,
            state=None if state is None else state[i],
            seq_idx=seq_idx,
            observe=observe,
        )
        if config.dropout and dropout_key is not None:
            hidden = dropout(hidden, rate=config.dropout, key=(*dropout_key, i))
        new_state.append(block_state)
    return _add_norm(hidden, residual, params["backbone.norm_f.weight"], config)[0], new_state


def _add_norm(hidden: Any, residual: Any, weight: Any, config: MambaConfig) -> tuple[Any, Any]:
    """Add the block's output to the stream and normalize the sum: one pass over memory.

    In half precision the stream, a sum over all layers, is float32 if the configuration says so, as it mostly does.
    """
    dtype = hidden.dtype
    if residual is None:
        stream = astype(hidden, compute_dtype(dtype)) if config.residual_in_fp32 else hidden
        return rms_norm(hidden, weight, eps=config.norm_eps), stream
    normed, stream = rms_norm(astype(hidden, residual.dtype), weight, eps=config.norm_eps, residual=residual)
    return astype(normed, dtype), stream


def _scores(hidden: Any, params: Params, config: MambaConfig) -> Any:
    """Return the logits of normalized last hidden values, float32 at least."""
    head = params["backbone.embeddings.weight" if config.tie_embeddings else "lm_head.weight"]
    return astype(linear(hidden, head), compute_dtype(hidden.dtype))


def _check_ids(name: str, input_ids: Any, ndim: int) -> None:
    shape = "(batch, seqlen)" if ndim == 2 else "(batch,)"
    if not hasattr(input_ids, "dtype") or input_ids.dtype.kind not in "iu":
        got = getattr(input_ids, "dtype", type(input_ids).__name__)
        raise TypeError(f"MambaLM: {name} must be an array {shape} of integers, got {got}")
    if input_ids.ndim != ndim:
        raise ValueError(f"MambaLM: {name} must be {shape}, got shape {input_ids.shape}")


def _check_state(config: MambaConfig, state: State) -> None:
    if len(state) != config.n_layer:
        raise ValueError(f"MambaLM: state must hold a BlockState for each of {config.n_layer} layers, got {len(state)}")


def logits(
    params: Params,
    config: MambaConfig,
    input_ids: Any,
    *,
    dropout_key: tuple[int, ...] | None = None,
    seq_idx: Any = None,
) -> Any:
    """Return the scores of every next token.

    Parameters
    ----------
    params : mapping
        Parameters by checkpoint key.
    config : MambaConfig
        Sizes and options.
    input_ids : integer array (batch, seqlen)
        Tokens.
    dropout_key : tuple of int, optional
        For example (seed, step): decides which values dropout removes. None: no dropout.
    seq_idx : integer array (batch, seqlen), optional
        Sequence numbers of a packed batch; negative ones are padding.

    Returns
    -------
    array (batch, seqlen, vocab)
        The vocabulary's `padded_vocab_size` scores: float64 for float64 parameters, else float32.

    Raises
    ------
    TypeError, ValueError
        If `input_ids` are not integers (batch, seqlen), or an id or `seq_idx` does not fit.
    """
    _check_ids("input_ids", input_ids, 2)
    hidden, _ = _hidden(params, config, input_ids, dropout_key=dropout_key, seq_idx=seq_idx)
    return _scores(hidden, params, config)


def loss(
    params: Params,
    config: MambaConfig,
    input_ids: Any,
    targets: Any,
    *,
    dropout_key: tuple[int, ...] | None = None,
    seq_idx: Any = None,
    ignore_index: int = -100,
) -> Any:
    """Return the mean cross-entropy, in nats per token, of `targets` at each position of `input_ids`.

    Parameters
    ----------
    params, config, input_ids, dropout_key, seq_idx
        As for `logits`.
    targets : integer array (batch, seqlen)
        The token that follows each position (`next_token_labels` shifts a text so); `ignore_index` where none counts.
    ignore_index : int
        Target that does not count.

    Returns
    -------
    array ()
        NaN if no target counts.

    Raises
    ------
    TypeError, ValueError
        As `logits`, and if `targets` do not fit.
    """
    scores = logits(params, config, input_ids, dropout_key=dropout_key, seq_idx=seq_idx)
    return cross_entropy(scores, targets, ignore_index=ignore_index)


def next_token_labels(labels: Any, ignore_index: int = -100) -> Any:
    """Shift labels that are aligned with the input by one: position t gets label t + 1, the last one none.

    The result is int64: bytes are fine as tokens, but cannot hold `ignore_index`.

    >>> import numpy as np
    >>> next_token_labels(np.array([[5, 6, 7]]))
    array([[   6,    7, -100]])
    """
    targets = array_module("next_token_labels", labels=labels).full(labels.shape, ignore_index, np.int64)
    targets[:, :-1] = labels[:, 1:]
    return targets


def init_state(params: Params, config: MambaConfig, batch: int) -> State:
    """Return the empty state for `batch` sequences: what every block remembers before the first token."""
    weight = params["backbone.layers.0.mixer.A_log"]
    zeros = array_module("init_state", params=weight).zeros
    conv, ssm = (batch, config.d_inner, config.d_conv - 1), (batch, config.d_inner, config.d_state)
    return [BlockState(zeros(conv, weight.dtype), zeros(ssm, weight.dtype)) for _ in range(config.n_layer)]


def prefill(params: Params, config: MambaConfig, input_ids: Any, state: State | None = None) -> tuple[Any, State]:
    """Read tokens all at once.

    Parameters
    ----------
    params, config
        As for `logits`.
    input_ids : integer array (batch, seqlen)
        At least one token each.
    state : list of BlockState, optional
        Where to go on from; left unchanged.

    Returns
    -------
    logits : array (batch, vocab)
        Scores of the token after the last one.
    state : list of BlockState
        To go on from, by `step` or by another `prefill`.

    Raises
    ------
    TypeError, ValueError
        As `logits`, and if there is no token or `state` is not that of this model.

    Examples
    --------
    >>> model = MambaLM(MambaConfig(vocab_size=7, d_model=16, n_layer=2))
    >>> scores, state = prefill(model.params, model.config, np.array([[1, 2, 3]]))
    >>> scores.shape, step(model.params, model.config, np.array([4]), state).shape
    ((1, 7), (1, 7))
    """
    _check_ids("input_ids", input_ids, 2)
    if input_ids.shape[1] < 1:
        raise ValueError(f"MambaLM: input_ids must have at least one token each, got shape {input_ids.shape}")
    if state is not None:
        _check_state(config, state)
    hidden, state = _hidden(params, config, input_ids, state=state)
    return _scores(hidden[:, -1], params, config), state


def step(params: Params, config: MambaConfig, token_ids: Any, state: State) -> Any:
    """Read one token per sequence.

    Parameters
    ----------
    params, config
        As for `logits`.
    token_ids : integer array (batch,)
        One token per sequence.
    state : list of BlockState
        From `init_state` or `prefill`; changed in place.

    Returns
    -------
    array (batch, vocab)
        Scores of the next token.

    Raises
    ------
    TypeError, ValueError
        If `token_ids` are not integers (batch,), or an id or the state does not fit.
    """
    _check_ids("token_ids", token_ids, 1)
    _check_state(config, state)
    hidden, residual = embedding(params["backbone.embeddings.weight"], token_ids), None
    for layer, block_state in zip(_layers(params, config), state, strict=True):
        normed, residual = _add_norm(hidden, residual, layer["norm.weight"], config)
        hidden = mamba_block_step(_mixer(layer), normed, config, block_state)
    hidden, _ = _add_norm(hidden, residual, params["backbone.norm_f.weight"], config)
    return _scores(hidden, params, config)


class MambaLM:
    """A Mamba language model: a configuration and its parameters.

    Parameters
    ----------
    config : MambaConfig
        Sizes and options.
    params : dict, optional
        Array by checkpoint key; drawn by `init_params` if None.
    seed : int
        Seed of the initialization.

    Raises
    ------
    ValueError
        If `params` are not those of `config`.

    Examples
    --------
    >>> import numpy as np
    >>> model = MambaLM(MambaConfig(vocab_size=7, d_model=16, n_layer=2))
    >>> model(np.array([[1, 2, 3]])).shape
    (1, 3, 7)
    >>> model.generate(np.array([[1, 2, 3]]), max_new_tokens=2).shape
    (1, 5)
    """

    def __init__(self, config: MambaConfig, params: dict[str, Any] | None = None, *, seed: int = 0) -> None:
        self.config = config
        self.params = init_params(config, seed=seed) if params is None else params
        _check_params(config, self.params)

    def __call__(self, input_ids: Any, *, seq_idx: Any = None) -> Any:
        """Return the logits (batch, seqlen, vocab) of every next token; see `logits`."""
        return logits(self.params, self.config, input_ids, seq_idx=seq_idx)

    def __repr__(self) -> str:
        c = self.config
        sizes = f"{c.n_layer} layers, d_model {c.d_model}, d_state {c.d_state}, vocabulary {c.vocab_size}"
        return f"MambaLM({sizes}: {c.parameter_count():,} parameters)"

    def loss_and_grads(
        self, input_ids: Any, labels: Any, *, ignore_index: int = -100, dropout_key: tuple[int, ...] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the loss and its gradient for every parameter.

        Parameters
        ----------
        input_ids, labels : integer arrays (batch, seqlen)
            Labels are aligned with the input (often the same array) and shifted inside.
        ignore_index : int
            Label that does not count.
        dropout_key : tuple of int, optional
            As for `logits`.

        Returns
        -------
        loss : array ()
            Mean nats per token.
        grads : dict
            Gradient by checkpoint key.

        Raises
        ------
        TypeError, ValueError
            As `loss`.
        """
        _check_ids("input_ids", input_ids, 2)
        _check_ids("labels", labels, 2)
        if labels.shape != input_ids.shape:
            raise ValueError(f"MambaLM: labels have shape {labels.shape}, but input_ids have shape {input_ids.shape}")
        targets = next_token_labels(labels, ignore_index)
        return value_and_grad(loss)(
            self.params, self.config, input_ids, targets, ignore_index=ignore_index, dropout_key=dropout_key
        )

    def init_state(self, batch: int) -> State:
        """Return the empty state for `batch` sequences."""
        return init_state(self.params, self.config, batch)

    def prefill(self, input_ids: Any, state: State | None = None) -> tuple[Any, State]:
        """Read tokens all at once; see `prefill`."""
        return prefill(self.params, self.config, input_ids, state)

    def step(self, token_ids: Any, state: State) -> Any:
        """Read one token per sequence, changing `state`; see `step`."""
        return step(self.params, self.config, token_ids, state)

    def generate(self, input_ids: Any, max_new_tokens: int, **options: Any) -> Any:
        """Continue `input_ids`; see `npmamba.generate.generate` for the options."""
        from npmamba.generate import generate  # a higher floor: generation is written in terms of the model

        return generate(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], *, backend: str = "numpy", dtype: Any = None
    ) -> MambaLM:
        """Load a checkpoint: ``config.json`` and ``model.safetensors`` as Hugging Face's transformers writes them.

        Parameters
        ----------
        folder : path
            Folder of the checkpoint.
        backend : {"numpy", "cupy"}
            Where the parameters go.
        dtype : dtype, optional
            float16, bfloat16, float32 or float64; None: as stored, but float32 for the half types. In half precision
            norms, convolutions, A_log, D and the bias of the step size stay float32. It is for GPUs: NumPy's matrix
            products of the half types are slow.

        Raises
        ------
        ValueError, TypeError, OSError
            If the files are missing, damaged, or do not belong together, or an option is unknown; the message says
            which.
        CudaUnavailableError
            If CuPy is asked for and cannot be used; the message says what is missing and how to mend it.
        """
        from npmamba.checkpoint import in_half, load_model

        if backend not in ("numpy", "cupy"):
            raise ValueError(f"MambaLM.from_pretrained: backend must be 'numpy' or 'cupy', got {backend!r}")
        wanted = None if dtype is None else _float_dtype(dtype)
        half = wanted is not None and wanted.name in HALF
        library = require_device() if backend == "cupy" else np
        config, params = load_model(folder, np.float32 if half else wanted)
        params = in_half(params, wanted) if half else params
        return cls(config, {key: library.asarray(value) for key, value in params.items()})

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: Any = None) -> None:
        """Save as ``config.json`` and ``model.safetensors``, which transformers' MambaForCausalLM reads.

        Parameters
        ----------
        folder : path
            Made if it does not exist.
        dtype : dtype, optional
            float16, bfloat16, float32 or float64; None: as the parameters are.
        """
        from npmamba.checkpoint import save_model

        save_model(folder, self.config, self.params, dtype)


def _check_params(config: MambaConfig, params: Params) -> None:
    """Raise ValueError at the first array that is missing, misshapen or not of the model."""
    expected = config.parameter_shapes()
    for key in {**expected, **params}:
        came = params[key].shape if key in params else None
        if came != expected.get(key):
            wanted = f"have shape {expected[key]}" if key in expected else "not be there"
            raise ValueError(f"MambaLM: params[{key!r}] must {wanted}, got {'none' if came is None else came}")


def _float_dtype(dtype: Any) -> np.dtype:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in FLOATS:
        raise TypeError(f"MambaLM.from_pretrained: dtype must be {', '.join(FLOATS)} or None, got {dtype!r}")
    return found
