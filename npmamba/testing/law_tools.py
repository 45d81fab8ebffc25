"""What laws are made of: on which arguments one says something, drawing what a case lacks, comparing, cutting time."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmamba.reference.functions import runs, silu
from npmamba.testing.law import Broken, Results, Scan, same_dtype, tolerance
from npmamba.testing.parts import step_size


def two_steps(arguments: dict[str, Any]) -> str:
    return "" if arguments["u"].shape[2] > 1 and arguments["u"].size else "the case has fewer than two steps"


def any_step(arguments: dict[str, Any]) -> str:
    return "" if arguments["u"].size else "the case is empty"


def two_rows(arguments: dict[str, Any]) -> str:
    return "" if arguments["u"].shape[0] > 1 and arguments["u"].size else "the case has fewer than two batch rows"


def two_channels(arguments: dict[str, Any]) -> str:
    return "" if arguments["u"].shape[1] > 1 and arguments["u"].size else "the case has fewer than two channels"


def two_states(arguments: dict[str, Any]) -> str:
    return "" if arguments["A"].shape[1] > 1 and arguments["u"].size else "the case has fewer than two states"


def decaying(arguments: dict[str, Any]) -> str:
    negative = np.all((arguments["A"] < 0) & np.isfinite(arguments["A"]))
    return any_step(arguments) or ("" if negative else "the case has rates that are not negative")


def decaying_in_two_steps(arguments: dict[str, Any]) -> str:
    return two_steps(arguments) or decaying(arguments)


def long_steps(arguments: dict[str, Any]) -> str:
    """A law that says delta otherwise needs a type in which that is the same: rounding it moves all that follows."""
    return any_step(arguments) or ("the case has steps in a short type" if arguments["u"].dtype.itemsize < 4 else "")


def long_decaying_steps(arguments: dict[str, Any]) -> str:
    return long_steps(arguments) or decaying(arguments)


def not_float64(arguments: dict[str, Any]) -> str:
    return "the case has the widest type already" if arguments["u"].dtype == np.float64 else ""


def normal(rng: np.random.Generator, like: Any, shape: Any = None) -> Any:
    """Draw standard normal numbers of the dtype of `like`, and its shape if no other is given."""
    return rng.standard_normal(like.shape if shape is None else shape).astype(like.dtype)


def drawn(scan: Scan, arguments: dict[str, Any], rng: np.random.Generator, *names: str) -> dict[str, Any]:
    """Return the arguments with an array for each optional name that the scan can take and the case has not."""
    batch, dim, _ = arguments["u"].shape
    shapes = {"z": arguments["u"].shape, "initial_state": (batch, *arguments["A"].shape)}
    new = {}
    for name in names:
        if scan.can(name) and arguments.get(name) is None:
            new[name] = normal(rng, arguments["u" if name == "z" else "A"], shapes.get(name, (dim,)))
    if "delta_bias" in new:
        new["delta_bias"] = np.abs(new["delta_bias"]) / 8  # a step that would be negative lets states grow
    return {**arguments, **new}


def compare(scan: Scan, got: Results, expected: Results, arguments: dict[str, Any], **how: Any) -> None:
    """Compare y and the last state; `how` has `bits`, the `allowed` results, `amplified` and `places` of y."""
    allowed, places = how.get("allowed") or tolerance(arguments), how.get("places", ...)
    test, times = scan.same if how.get("bits") else scan.close, how.get("amplified", 1.0)
    test("y", got.y[places], expected.y[places], times * allowed.y[places], arguments)
    if got.last_state is not None and expected.last_state is not None:
        test("last_state", got.last_state, expected.last_state, times * allowed.last_state, arguments)


def combined(one: Results, two: Results, alpha: float = 1.0, beta: float = 1.0) -> Results:
    return Results(*(None if p is None else alpha * wide(p) + beta * wide(q) for p, q in zip(one, two, strict=True)))


def wide(x: Any) -> Any:
    return np.asarray(x, np.float64)


def gate_of(arguments: dict[str, Any]) -> Any:
    return 1.0 if arguments.get("z") is None else silu(wide(arguments["z"]))


def amplification(arguments: dict[str, Any]) -> float:
    """Return how much more than usual a rounded step or a long product of decays may change the result.

    The error of e^x is |x| times that of x, and a product of many decays has an error of each.
    """
    time = np.abs(step_size(arguments)).sum(-1)
    return 1 + float(np.max(time, initial=0) * np.abs(arguments["A"]).max()) / 32 + arguments["u"].shape[2] / 128


def in_pieces(arguments: dict[str, Any], edges: list[int]) -> list[Any]:
    """Return slices of time between the edges, in the order of the scan."""
    pieces = [np.s_[i:j] for i, j in zip(edges[:-1], edges[1:], strict=True)]
    return pieces[:: -1 if arguments.get("reverse") else 1]


def joined(results: list[Results], arguments: dict[str, Any]) -> Results:
    """Return the results of pieces of time, in the order of the scan, as those of one."""
    in_time = results[:: -1 if arguments.get("reverse") else 1]
    return Results(np.concatenate([r.y for r in in_time], axis=2), results[-1].last_state)


def some_edges(rng: np.random.Generator, seqlen: int) -> list[int]:
    inner = rng.choice(np.arange(1, seqlen), size=min(seqlen - 1, int(rng.integers(1, 4))), replace=False)
    return [0, *sorted(int(i) for i in inner), seqlen]


def after(arguments: dict[str, Any], count: int) -> Any:
    """Return the slice of time that comes after the first `count` steps of the scan."""
    return np.s_[: arguments["u"].shape[2] - count] if arguments.get("reverse") else np.s_[count:]


def before(arguments: dict[str, Any], count: int) -> Any:
    """Return the slice of the first `count` steps of the scan."""
    return np.s_[arguments["u"].shape[2] - count :] if arguments.get("reverse") else np.s_[:count]


def starts_of(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Return which steps count and which start a sequence, (batch, seqlen) of bool, in the order of the scan."""
    batch, _, seqlen = arguments["u"].shape
    seq_idx = arguments.get("seq_idx")
    flip = np.s_[:, ::-1] if arguments.get("reverse") else np.s_[:, :]
    valid, start = runs(None if seq_idx is None else seq_idx[flip], batch, seqlen)
    return valid[flip], start[flip]


def fortran(x: Any) -> Any:
    return np.asfortranarray(x)


def strided(x: Any) -> Any:
    big = np.full([2 * n for n in x.shape], 7, x.dtype)
    big[tuple(np.s_[1::2] for _ in x.shape)] = x
    return big[tuple(np.s_[1::2] for _ in x.shape)]


def negative(x: Any) -> Any:
    flip = tuple(np.s_[::-1] for _ in x.shape)
    return x[flip].copy()[flip]


def read_only(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


# --- what a call may touch ---


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with copies of their arrays."""
    return {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def laid_out(arguments: dict[str, Any], rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return arguments of the same values: each array somewhere in memory, and all in C order."""
    laid, layouts = dict(arguments), (fortran, strided, negative, read_only)
    for name, x in arguments.items():
        if isinstance(x, np.ndarray):
            laid[name] = layouts[rng.integers(len(layouts))](x)
    return laid, {name: np.array(x, order="C") if isinstance(x, np.ndarray) else x for name, x in arguments.items()}


def check_untouched(
    before: dict[str, Any], now: dict[str, Any], results: list[Any], what: str, arguments: dict[str, Any]
) -> None:
    """Break the law if an array is no longer as `before`, or a result, told as `what`, lies in its memory."""
    for name, x in before.items():
        if not isinstance(x, np.ndarray):
            continue
        if now[name].tobytes() != x.tobytes():
            raise Broken(f"the call changed {name}", x, now[name], np.inf, arguments)
        if any(np.shares_memory(now[name], r) for r in results):
            raise Broken(f"{what} lies in the memory of {name}", None, None, np.inf, arguments)


def results_of_their_own(candidate: Any, arguments: dict[str, Any], likes: tuple[str, str]) -> tuple[Results, Results]:
    """Call a candidate, which may change and return nothing of the arguments, nor dtypes other than those of `likes`.

    Returns y and the last state as they came, and copies of them.
    """
    copies = copied(arguments)
    first = candidate(arguments)
    kept = Results(*(None if x is None else x.copy() for x in first))
    check_untouched(copies, arguments, [r for r in first if r is not None], "a result", arguments)
    for what, x, like in zip(("y", "last_state"), first, likes, strict=True):
        if x is not None and same_dtype(x) != same_dtype(arguments[like]):
            raise Broken(f"{what} has dtype {x.dtype}, not {arguments[like].dtype}", None, x, np.inf, arguments)
    return first, kept


def gradients_of_their_own(candidate: Any, arguments: dict[str, Any], dout: Any, dlast: Any) -> dict[str, Any]:
    """Call a candidate's backward, which may change and return nothing of dout and the arguments, nor other dtypes."""
    given = {**arguments, "dout": dout}
    copies = copied(given)
    gradients: dict[str, Any] = candidate.gradients(arguments, dout, dlast)
    check_untouched(copies, given, list(gradients.values()), "a gradient", arguments)
    for name, gradient in gradients.items():
        if same_dtype(gradient) != same_dtype(arguments[name]):
            what = f"the gradient of {name} has dtype {gradient.dtype}, not {arguments[name].dtype}"
            raise Broken(what, None, gradient, np.inf, arguments)
    return gradients
