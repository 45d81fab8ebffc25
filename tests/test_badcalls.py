"""Every call of tests/badcalls.py is answered rightly, or refused at once in a sentence that helps.

Right means the reference's value in a plain array. A refusal is a ValueError or TypeError that begins with the name of
the operation, names the argument and says what came and what was expected; it compiles nothing, takes no time and
leaves every array as it was, the state of an update too.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from badcalls import BY_NAME, CALLS, OPERATIONS, OTHER_CALLS, Call, OtherCall
from numba import config

from npmamba.autodiff import algebra, optim
from npmamba.autodiff.tape import Traced, value_of
from npmamba.autodiff.tree import tree_items, tree_map
from npmamba.cpu.runtime import Kernel

SECONDS = 5.0 if config.DISABLE_JIT else 0.05
TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 2e-5, "float64": 1e-11}
CAME = re.compile(r"\b(got|has|is|sizes|missing|unexpected|unknown|differ|neither|not valid JSON)\b|=")
EXPECTED = re.compile(
    r"\b(must|expected|missing|unexpected|did you mean|known are|no gradient|in place|without|neither|not valid JSON)\b"
)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled_from_here_on() -> Iterator[None]:
    """Compile what right calls need, then take the compiler away."""
    for dtype in (np.float64, np.float32):
        for operation in OPERATIONS:
            given = operation.arguments(dtype)
            operation.function(**given)
            if "discretization" in given:
                operation.function(**operation.arguments(dtype) | {"discretization": "zoh"})
                operation.function(**operation.arguments(dtype) | {"B": given["A"].astype(dtype)})
        algebra.dropout(np.ones(3, dtype), rate=0.5, key=(1,))
        tree = {"w": np.ones(3, dtype)}
        optim.clip_factor(tree, 1.0)
        optim.adamw(0.1).update(tree, optim.adamw(0.1).init(tree), tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "_compile", _no_compiler)
        yield


def _no_compiler(kernel: Kernel, dtype: Any) -> Any:
    raise AssertionError(f"{kernel.name} is compiled for {dtype}")


def test_the_catalogue_has_at_least_five_hundred_calls_of_every_operation_s_every_argument():
    assert len(CALLS) >= 500
    assert len(OTHER_CALLS) >= 500
    assert {call.operation.name for call in CALLS} == set(BY_NAME)
    for operation in OPERATIONS:
        tried = {call.argument for call in CALLS if call.operation is operation}
        assert {*operation.axes, *operation.options} <= tried


# --- what is asked of an answer ---


def snapshot(x: Any) -> Any:
    """Return what must not change of an argument."""
    if isinstance(x, Traced):
        return snapshot(x.value)
    if not isinstance(x, np.ndarray) or x.dtype.hasobject:
        return None
    return x.dtype.str, x.shape, x.strides, x.flags.writeable, x.tobytes()


def answer(run: Callable[[], Any]) -> tuple[Any, Exception | None, float]:
    start = time.perf_counter()
    try:
        with np.errstate(all="ignore") if config.DISABLE_JIT else contextlib.nullcontext():  # kernels warn of nothing
            out, error = run(), None
    except Exception as caught:  # whatever it is, it is judged
        out, error = None, caught
    return out, error, time.perf_counter() - start


def fault_of_refusal(error: Exception, operation: str, argument: str) -> str | None:
    """Say what is wrong with the refusal of a call."""
    text = str(error)
    if type(error) not in (ValueError, TypeError):
        return f"{type(error).__name__}: {text[:200]}"
    if not re.match(rf"{re.escape(operation)}(\.\w+)?(:|\(\))", text):
        return f"does not begin with the operation: {text[:200]}"
    if argument and not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in argument.split()):
        return f"does not name {argument}: {text[:200]}"
    if not CAME.search(text) or not EXPECTED.search(text):
        return f"does not say what came and what was expected: {text[:200]}"
    return f"is {len(text)} characters long: {text[:100]}" if len(text) > 400 else None


def wrong_value(got: Any, wanted: Any) -> bool:
    if wanted is None or got is None:
        return got is not wanted
    if isinstance(wanted, tuple):
        return len(got) != len(wanted) or any(map(wrong_value, got, wanted))
    if not isinstance(got, np.ndarray | np.generic) or got.shape != np.shape(wanted):
        return True
    tolerance = TOLERANCE[got.dtype.name] * max(1.0, np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted)))
    return not np.allclose(got.astype(np.float64), wanted, rtol=0, atol=tolerance, equal_nan=True)


def fault(call: Call) -> str | None:
    """Make a call and say what is wrong with its answer."""
    operation, given = call.operation, call.arguments()
    copies = {name: x.copy() if isinstance(x, np.ndarray) else value_of(x) for name, x in given.items()}
    before = {name: snapshot(x) for name, x in given.items()}
    out, error, seconds = answer(lambda: operation.function(**given))
    changed = [name for name, x in given.items() if snapshot(x) != before[name]]
    if [name for name in changed if error or name != operation.in_place]:
        return f"changed {changed}"
    if seconds > SECONDS:  # once more: another process may have had the processor
        seconds = min(answer(lambda: operation.function(**call.arguments()))[2] for _ in range(3))
    if seconds > SECONDS:
        return f"took {1e3 * seconds:.0f} ms"
    if error is not None:
        return fault_of_refusal(error, operation.name, call.argument)
    out = (out, given[operation.in_place]) if operation.in_place else tree_map(value_of, out)
    plain = [x for x in (out[:1] if operation.in_place else [x for _, x in tree_items(out)]) if x is not None]
    if any(type(x) is not np.ndarray and not isinstance(x, np.generic) for x in plain):
        return f"is {[type(x).__name__ for x in plain]}"
    with np.errstate(all="ignore"):
        return "is wrong" if wrong_value(_plain(out), _plain(operation.reference(copies))) else None


def _plain(x: Any) -> Any:
    return tuple(_plain(y) for y in x) if isinstance(x, tuple) else x


# --- the calls ---


def grouped(calls: list[Any]) -> dict[str, list[Any]]:
    groups = defaultdict(list)
    for call in calls:
        operation = getattr(call.operation, "name", call.operation)
        groups[f"{operation}-{call.argument.partition(' ')[0]}"].append(call)
    return dict(groups)


ARRAYS, OTHERS = grouped(CALLS), grouped(OTHER_CALLS)


@pytest.mark.parametrize("group", ARRAYS)
def test_a_bad_call_of_an_operation_is_right_or_refused(group):
    faults = {repr(call): found for call in ARRAYS[group] if (found := fault(call))}
    assert not faults


@pytest.mark.parametrize("group", OTHERS)
def test_any_other_bad_call_is_right_or_refused(group):
    faults = {repr(call): found for call in OTHERS[group] if (found := fault_of_other(call))}
    assert not faults


def fault_of_other(call: OtherCall) -> str | None:
    before = {path: snapshot(x) for path, x in tree_items(call.given)}
    out, error, seconds = answer(lambda: call.function(**call.given))
    if {path: snapshot(x) for path, x in tree_items(call.given)} != before:
        return "changed an argument"
    if seconds > SECONDS:
        seconds = min(answer(lambda: call.function(**call.given))[2] for _ in range(3))
    if seconds > SECONDS:
        return f"took {1e3 * seconds:.0f} ms"
    if error is not None:
        return fault_of_refusal(error, call.operation, call.argument)
    with np.errstate(all="ignore"):
        return None if call.right(out) else f"is wrong: {str(out)[:100]}"
