"""The laws of one step of a scan: steps, one after the other, are a scan, so all laws of scans are laws of the step.

>>> import npmamba
>>> scan, capabilities = as_scan(npmamba.selective_state_update)
>>> case = scan_case(UpdateCase(2, 3, 4)).arguments(np.float32)
>>> [law.name for law in STEP_LAWS if law.check(scan, case, np.random.default_rng(0), capabilities)]
[]
>>> def forgetful(state, x, dt, A, B, C):  # hands back a new state and leaves the old one as it was
...     return npmamba.selective_state_update(state.copy(), x, dt, A, B, C)
>>> scan, capabilities = as_scan(forgetful)
>>> "a_scan_is_the_scan_of_its_parts" in [
...     law.name for law in STEP_LAWS if law.check(scan, case, np.random.default_rng(0), capabilities)]
False
>>> "an_impulse_leaves_a_decaying_trace" in [
...     law.name for law in STEP_LAWS if law.check(scan, case, np.random.default_rng(0), capabilities)]
True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npmamba.testing.capabilities import MAPS, Capabilities
from npmamba.testing.cases import ScanCase, ScanOptions, UpdateCase
from npmamba.testing.comparison import takes
from npmamba.testing.law import Law
from npmamba.testing.laws import LAWS

NAMES = {n: n.replace("delta", "dt") for n in ("D", "z", "delta_bias", "delta_softplus", "discretization")}
"""Options of a scan, and what a step calls them."""
STEPS = 5

_NOT_ASKED = {"reverse", "seq_idx", "step", "backward", "return_last_state"}
STEP_LAWS: tuple[Law, ...] = tuple(law for law in LAWS if not _NOT_ASKED & set(law.needs))
"""The laws of scans that have something to say about a step."""


def as_scan(step: Callable[..., Any], **changes: Any) -> tuple[Callable[..., Any], Capabilities]:
    """Return the scan that takes one step after the other, and what it can be asked.

    Parameters
    ----------
    step : callable
        Like ``npmamba.selective_state_update``: changes the state it is given, and returns y.
    **changes
        Of the capabilities. Without `strides` a step is given its part of what has time in C order.
    """
    options = {name: own for name, own in NAMES.items() if takes(step, own)}
    any_memory = changes.get("strides", True)

    def at(x: Any, t: int) -> Any:
        return x[..., t] if any_memory else np.ascontiguousarray(x[..., t])

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, initial_state: Any = None, **given: Any) -> tuple[Any, Any]:
        (batch, dim, seqlen), y = u.shape, []
        state = np.zeros((batch, *A.shape), A.dtype) if initial_state is None else initial_state.copy()
        for t in range(seqlen):
            now = {options[n]: at(x, t) if n == "z" else x for n, x in given.items()}
            y.append(step(state=state, x=at(u, t), dt=at(delta, t), A=A, B=at(B, t), C=at(C, t), **now))
        for one in y:
            if np.shape(one) != (batch, dim):
                raise ValueError(f"y has shape {np.shape(one)}, not {(batch, dim)}")
        return np.stack(y, axis=-1), state

    rules = Capabilities.rules if "discretization" in options else ("euler",)
    known: dict[str, Any] = {"keywords": frozenset({*options, "initial_state"}), "rules": rules}
    return scan, Capabilities(**known | {"maps": (MAPS[3], MAPS[4])} | changes)


def _varying(kind: str | int) -> str | int:
    return "variable" if kind == "constant" else kind


def scan_case(case: UpdateCase) -> ScanCase:
    """Return a case of a few steps with the sizes, options and seed of a case of one.

    Constant maps are drawn anew at each step: laws ask for fewer rows, and a step takes a constant map of two channels
    for one of two rows.

    >>> scan_case(UpdateCase(1, 2, 3, seed=4))
    ScanCase(batch=1, dim=2, seqlen=5, dstate=3, options=ScanOptions(initial_state=True), seed=4)
    """
    of, size = case.options, (case.batch, case.dim, STEPS, case.dstate)
    options = ScanOptions(
        B=_varying(of.B), C=_varying(of.C), D=of.D, z=of.z, delta_bias=of.dt_bias, delta_softplus=of.dt_softplus,
        initial_state=True, discretization=of.discretization,
    )  # fmt: skip
    return ScanCase(*size, options, magnitude=case.magnitude, layout=case.layout, seed=case.seed)
