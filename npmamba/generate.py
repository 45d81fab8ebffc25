"""Sampling: from the logits of the next token to text, one token at a time.

A recurrent model needs no growing cache: the prompt is read once (``prefill``), then each new token costs one
``step`` of a state whose size never changes. A model on a GPU stays there; logits come, tokens go.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from npmamba.backend import beside, on_host


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

    Examples
    --------
    >>> probabilities([2.0, 1.0, 0.0], top_k=2).round(3)
    array([0.731, 0.269, 0.   ])
    """
    _check_options(temperature, top_k, top_p)
    x = np.asarray(logits, dtype=np.float64)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"probabilities: logits must be (..., vocab) with vocab >= 1, got shape {x.shape}")
    peak = x.max(axis=-1, keepdims=True)
    if not np.isfinite(peak).all():
        raise ValueError("probabilities: a row of logits holds NaN or has no finite largest value")
    if temperature == 0:
        return _one_hot(x)
    with np.errstate(over="ignore"):  # (x - peak) / 1e-300 is -inf, whose exp is 0: what is meant
        p = np.exp((x - peak) / temperature)
    p /= p.sum(axis=-1, keepdims=True)
    return _keep_nucleus(_keep_likeliest(p, top_k), top_p)


def _check_options(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0: no limit), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1: no limit), got {top_p}")


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
    p = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
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
    """Yield the next tokens (batch,) as they are drawn; the arguments are those of `generate`."""
    ids = _check_prompt(input_ids)
    _check_options(temperature, top_k, top_p)
    rng = np.random.default_rng(seed)
    done = np.zeros(ids.shape[0], dtype=bool)
    if max_new_tokens <= 0:
        return
    logits, state = model.prefill(_placed(model, ids))
    for n in range(max_new_tokens):
        token = sample_token(on_host(logits), rng, temperature, top_k, top_p)
        if eos_token_id is not None:
            token = np.where(done, eos_token_id, token)
            done |= token == eos_token_id
        yield token
        if done.all() or n + 1 == max_new_tokens:
            return
        logits = model.step(_placed(model, token), state)


def _placed(model: Any, tokens: Any) -> Any:
    """Return tokens in the library of the model's parameters."""
    params = getattr(model, "params", None)
    return beside("generate", next(iter(params.values())), tokens) if params else tokens


def _check_prompt(input_ids: ArrayLike) -> NDArray[np.integer]:
    ids = np.asarray(on_host(input_ids))
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"generate: input_ids must be integers (batch, seqlen), got {ids.dtype} {ids.shape}")
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
    temperature, top_k, top_p
        As in `probabilities`; temperature 0 is greedy.
    seed : int, optional
        The same seed gives the same tokens; None draws a new one each time.
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
