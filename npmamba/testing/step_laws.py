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

from npmamba.testing.capabilities import Capabilities
from npmamba.testing.cases import ScanCase, ScanOptions, UpdateCase
from npmamba.testing.comparison import takes
from npmamba.testing.law import Law
from npmamba.testing.laws import LAWS

NAMES = {"D": "D", "z": "z", "delta_bias": "dt_bias", "delta_softplus": "dt_softplus", "discretization": "discretization"}
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
        Of the capabilities.
    """
    options = {name: theirs for name, theirs in NAMES.items() if takes(step, theirs)}

    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, initial_state: Any = None, **given: Any) -> tuple[Any, Any]:
        (batch, dim, seqlen), y = u.shape, []
        state = np.zeros((batch, *A.shape), A.dtype) if initial_state is None else initial_state.copy()
        for t in range(seqlen):
            now = {options[n]: x[..., t] if n == "z" else x for n, x in given.items()}
            maps = {name: _map(M, t, batch, dim) for name, M in (("B", B), ("C", C))}
            y.append(step(state=state, x=u[..., t], dt=delta[..., t], A=A, **maps, **now))
        for one in y:
            if np.shape(one) != (batch, dim):
                raise ValueError(f"y has shape {np.shape(one)}, not {(batch, dim)}")
        return np.stack(y, axis=-1), state

    rules = Capabilities.rules if "discretization" in options else ("euler",)
    keywords = frozenset({*options, "initial_state"})
    return scan, Capabilities(**{"keywords": keywords, "rules": rules, **changes})


def _map(M: Any, t: int, batch: int, dim: int) -> Any:
    """Return B or C of one step; a constant one that could be taken for (batch, dstate) is given to every channel."""
    if M.ndim > 2:
        return M[..., t]
    return M if batch != dim else np.broadcast_to(M, (batch, *M.shape)).copy()


def scan_case(case: UpdateCase) -> ScanCase:
    """Return a case of a few steps with the sizes, options and seed of a case of one; B and C have as many groups.

    >>> scan_case(UpdateCase(1, 2, 3, seed=4))
    ScanCase(batch=1, dim=2, seqlen=5, dstate=3, options=ScanOptions(initial_state=True), seed=4)
    """
    of, size = case.options, (case.batch, case.dim, STEPS, case.dstate)
    options = ScanOptions(
        B=of.B, C=of.C, D=of.D, z=of.z, delta_bias=of.dt_bias, delta_softplus=of.dt_softplus, initial_state=True,
        discretization=of.discretization,
    )  # fmt: skip
    return ScanCase(*size, options, magnitude=case.magnitude, layout=case.layout, seed=case.seed)
