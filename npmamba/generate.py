"""Sampling: from the logits of the next token to text, one token at a time.

A recurrent model needs no growing cache: the prompt is read once (``prefill``), then each new token costs one
``step`` of a state whose size never changes. A model on a GPU stays there; logits come, tokens go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npmamba.backend import beside, on_host
from npmamba.shapes import FLOATS, Arguments


def probabilities(
    logits: ArrayLike, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> NDArray[np.float64]:
    """Turn logits into the distribution that the next token is drawn from.

    ``p = softmax(logits / temperature)``; then only the `top_k` likeliest tokens stay and p is normalised;
    then only the smallest set of likeliest tokens whose probabilities sum to `top_p` stays (nucleus sampling,
    Holtzman et al. 2020) and p is normalised again. Ties go to the lower token id.

    Parameters
    ----------
    logits : array (..., vocab)
    temperature : float
        0 puts all probability on the likeliest token.
    top_k : int
        0 for no limit.
    top_p : float
        In (0, 1]; 1 for no limit.

    Returns
    -------
    array (..., vocab), float64
        Rows sum to 1.

    Raises
    ------
    ValueError
        If an option is out of range, or a row of `logits` holds NaN or no finite largest value.
    TypeError
        If `logits` are no real numbers, or an option has the wrong type.

    Examples
    --------
    >>> probabilities([2.0, 1.0, 0.0], top_k=2).round(3)
    array([0.731, 0.269, 0.   ])
    """
    _check_options("probabilities", temperature, top_k, top_p)
    return _distribution("probabilities", logits, temperature, top_k, top_p)


def _distribution(op: str, logits: Any, temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """Do what `probabilities` says, under the name of the function that was called; its options have been checked."""
    x = _check_logits(op, logits)
    peak = x.max(axis=-1, keepdims=True)
    if not np.isfinite(peak).all():
        raise ValueError(f"{op}: a row of logits holds NaN or has no finite largest value")
    if temperature == 0:
        return _one_hot(x)
    with np.errstate(over="ignore"):  # (x - peak) / 1e-300 is -inf, whose exp is 0: what is meant
        p = np.exp((x - peak) / temperature)
    p /= p.sum(axis=-1, keepdims=True)
    return _keep_nucleus(_keep_likeliest(p, top_k), top_p)


def _check_options(op: str, temperature: Any, top_k: Any, top_p: Any) -> None:
    check = Arguments(op)
    check.number("temperature", temperature, lambda x: 0 <= x < np.inf, "at least 0 and finite")
    check.integer("top_k", top_k, 0)
    check.number("top_p", top_p, lambda x: 0 < x <= 1, "above 0 and at most 1 (1: no limit)")


def _check_logits(op: str, logits: Any) -> NDArray[np.float64]:
    """Return logits as float64."""
    x = _as_array(logits)
    if x is None or not (x.dtype.kind in "iuf" or x.dtype.name in FLOATS):
        came = type(logits).__name__ if x is None else x.dtype
        raise TypeError(f"{op}: logits must be real numbers (..., vocab), got {came}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: logits must be (..., vocab) with vocab >= 1, got shape {x.shape}")
    return x.astype(np.float64)


def _as_array(x: Any) -> Any:
    """Return an array, or lists of numbers, as a NumPy array; None for anything else."""
    if isinstance(x, np.ma.MaskedArray):  # its mask would be forgotten
        return None
    try:
        return np.asarray(on_host(x))
    except (TypeError, ValueError, OverflowError):
        return None


def _one_hot(x: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.zeros_like(x)
    np.put_along_axis(p, x.argmax(axis=-1, keepdims=True), 1.0, axis=-1)
    return p


def _keep_likeliest(p: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    if top_k == 0 or top_k >= p.shape[-1]:
        return p
    order = np.argsort(-p, axis=-1, kind="stable")
    kept = p.copy()
    np.put_along_axis(kept, order[..., top_k:], 0.0, axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)


def _keep_nucleus(p: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    if top_p >= 1:
        return p
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=-1)
    before = np.cumsum(ranked, axis=-1) - ranked
    before[..., 0] = 0.0  # the likeliest token always stays
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, np.where(before < top_p, ranked, 0.0), axis=-1)
    return kept / kept.sum(axis=-1, keepdims=True)


def sample_token(
    logits: ArrayLike, rng: np.random.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> NDArray[np.int64]:
    """Draw one token per row of `logits` from `probabilities`, by the inverse of the cumulative distribution.

    Parameters
    ----------
    logits : array (batch, vocab)
    rng : numpy.random.Generator
        One number is drawn per row, none at temperature 0.
    temperature, top_k, top_p
        As in `probabilities`.

    Returns
    -------
    array (batch,), int64

    Examples
    --------
    >>> sample_token([[0.0, 3.0, 1.0]], np.random.default_rng(0), temperature=0)
    array([1])
    """
    _check_options("sample_token", temperature, top_k, top_p)
    if not callable(getattr(rng, "random", None)):
        raise TypeError(f"sample_token: rng must be a numpy.random.Generator, got {type(rng).__name__}")
    return _draw("sample_token", logits, rng, temperature, top_k, top_p)


def _draw(
    op: str, logits: Any, rng: np.random.Generator, temperature: float, top_k: int, top_p: float
) -> NDArray[np.int64]:
    p = _distribution(op, logits, temperature, top_k, top_p)
    if temperature == 0:
        return p.argmax(axis=-1)
    cdf = np.cumsum(p, axis=-1)
    u = rng.random(p.shape[:-1] + (1,)) * cdf[..., -1:]
    token = (cdf <= u).sum(axis=-1)
    # Rounding can carry u up to the last sum; a token of probability 0 must not come of it.
    last = p.shape[-1] - 1 - (p[..., ::-1] > 0).argmax(axis=-1)
    return np.minimum(token, last).astype(np.int64)


def stream(
    model: Any,
    input_ids: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | None = None,
) -> Iterator[NDArray[np.int64]]:
    """Yield the next tokens (batch,) as they are drawn; the arguments are those of `generate`, checked at once."""
    ids, check = _check_prompt(input_ids), Arguments("generate")
    if not callable(getattr(model, "prefill", None)) or not callable(getattr(model, "step", None)):
        raise TypeError(f"generate: model must have the methods prefill and step, got {type(model).__name__}")
    new = check.integer("max_new_tokens", max_new_tokens, 0)
    _check_options("generate", temperature, top_k, top_p)
    seed = None if seed is None else check.integer("seed", seed, 0, math.inf)
    eos_token_id = None if eos_token_id is None else check.integer("eos_token_id", eos_token_id)
    return _stream(model, ids, new, (temperature, top_k, top_p), np.random.default_rng(seed), eos_token_id)


def _stream(
    model: Any, ids: Any, new: int, limits: tuple[float, int, float], rng: np.random.Generator, eos: int | None
) -> Iterator[NDArray[np.int64]]:
    if new == 0:
        return
    done = np.zeros(ids.shape[0], dtype=bool)
    logits, state = model.prefill(_placed(model, ids))
    for n in range(new):
        token = _draw("generate", on_host(logits), rng, *limits)
        if eos is not None:
            token = np.where(done, eos, token)
            done |= token == eos
        yield token
        if done.all() or n + 1 == new:
            return
        logits = model.step(_placed(model, token), state)


def _placed(model: Any, tokens: Any) -> Any:
    """Return tokens in the library of the model's parameters."""
    params = getattr(model, "params", None)
    return beside("generate", next(iter(params.values())), tokens) if params else tokens


def _check_prompt(input_ids: Any) -> NDArray[np.integer]:
    ids = _as_array(input_ids)
    if ids is None or ids.ndim != 2 or ids.dtype.kind not in "iu":
        came = type(input_ids).__name__ if ids is None else f"{ids.dtype} {ids.shape}"
        raise ValueError(f"generate: input_ids must be integers (batch, seqlen), got {came}")
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise ValueError(f"generate: input_ids must hold at least one token per row, got shape {ids.shape}")
    return ids


def generate(
    model: Any,
    input_ids: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | None = None,
) -> NDArray[np.integer]:
    """Continue each row of `input_ids` by up to `max_new_tokens` tokens.

    Parameters
    ----------
    model : MambaLM
        Anything with ``prefill(ids) -> (logits, state)`` and ``step(ids, state) -> logits`` will do.
    input_ids : array (batch, seqlen), integers
    max_new_tokens : int
        0 or more.
    temperature, top_k, top_p
        As in `probabilities`; temperature 0 is greedy.
    seed : int, optional
        0 or more. The same seed gives the same tokens; None draws a new one each time.
    eos_token_id : int, optional
        A row that has drawn it goes on with it; when all rows have, generation stops.

    Returns
    -------
    NumPy array (batch, seqlen + new), of `input_ids`' dtype
        Tokens are drawn on the CPU, wherever the model is.

    Raises
    ------
    ValueError
        If `input_ids` is not a non-empty (batch, seqlen) array of integers, or an option is out of range.
    TypeError
        If `model` lacks a method, or an option has the wrong type.

    Examples
    --------
    A model that always says "one more":

    >>> class Counter:
    ...     def prefill(self, ids):
    ...         return self.step(ids[:, -1], None), None
    ...     def step(self, token, state):
    ...         return np.eye(8)[(token + 1) % 8]
    >>> generate(Counter(), [[5]], 4)
    array([[5, 6, 7, 0, 1]])
    """
    ids = _check_prompt(input_ids)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    new = list(stream(model, ids, max_new_tokens, **options, eos_token_id=eos_token_id))
    return np.concatenate([ids, *(token[:, None].astype(ids.dtype) for token in new)], axis=1)
