"""The laws of the selective scan: theorems that follow from its equations, each with a check that asks the scan alone.

With Delta_t the step, a_t = exp(Delta_t A) the decay and f_t = Delta_t ("euler") or (a_t - 1) / A ("zoh")::

    h_t = a_t h_{t-1} + f_t B_t u_t        y_t = (sum_n C_t h_t + D u_t) silu(z_t)

A scan that obeys all of them on all arguments is the scan: an impulse has the right trace, and all else follows.

>>> import numpy as np, npmamba
>>> one = np.ones((1, 1, 3))
>>> case = {"u": one, "delta": one, "A": -np.ones((1, 1)), "B": one, "C": one}
>>> [law.name for law in LAWS if law.check(npmamba.selective_scan, case, np.random.default_rng(0))]
[]
>>> def wrong(u, delta, A, B, C):  # the step is forgotten in the inflow
...     return npmamba.selective_scan(u / delta, delta, A, B, C)
>>> case["delta"] = one / 2
>>> no_state = Capabilities.of(wrong, last_state=False)
>>> {law.name for law in LAWS if law.check(wrong, case, np.random.default_rng(0), no_state)} >= {
...     "units_of_time_do_not_matter", "an_impulse_leaves_a_decaying_trace"}
True
"""

from __future__ import annotations

from npmamba.testing import algebra_laws, decay_laws, time_laws
from npmamba.testing.law import Capabilities, Law, Results, Violation

LAWS: tuple[Law, ...] = tuple(
    x for module in (algebra_laws, time_laws, decay_laws) for x in vars(module).values() if isinstance(x, Law)
)

__all__ = ["LAWS", "Capabilities", "Law", "Results", "Violation"]
