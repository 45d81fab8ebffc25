"""The verdict on a kernel: broken, with the smallest case that shows it, or not broken by so many cases.

`check_scan` draws cases (`npmamba.testing.strategies`), compares the kernel's results and gradients with what they
should be (`npmamba.testing.oracles`) in units of what rounding allows (`npmamba.testing.tolerance`), and tries the laws
that hold for every scan (`npmamba.testing.laws`). `check_conv1d` and `check_state_update` compare likewise.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

try:
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings
except ImportError:
    raise ImportError(
        "npmamba.testing.verdict needs the package hypothesis, which the extra `fuzz` brings: "
        'pip install "npmamba[fuzz]"'
    ) from None

from npmamba.reference import causal_conv1d, selective_scan
from npmamba.testing import strategies, tolerance
from npmamba.testing.cases import ConvCase, ScanCase, UpdateCase
from npmamba.testing.comparison import Difference, compare, difference, outputs, takes
from npmamba.testing.conv_gradient_laws import CONV_GRADIENT_LAWS
from npmamba.testing.conv_laws import CONV_LAWS
from npmamba.testing.conv_tools import Conv
from npmamba.testing.gradient_laws import GRADIENT_LAWS
from npmamba.testing.law import MAPS, Broken, Law, Scan
from npmamba.testing.laws import LAWS, Capabilities
from npmamba.testing.oracles import exact_conv, exact_scan, exact_update
from npmamba.testing.step_laws import STEP_LAWS, as_scan, scan_case

Case = Any


class Counterexample(AssertionError):
    """A kernel is wrong; raised with the smallest case that was found.

    Attributes
    ----------
    case : ScanCase, ConvCase or UpdateCase
    reason : str
        What is wrong: a result that is off, or a law that does not hold.
    examples : int
        How many cases had been tried when the first one failed.
    script : str
        A program that shows it, if the kernel was named; else "".
    """

    def __init__(self, reason: str, case: Case, examples: int = 0, script: str = "") -> None:
        super().__init__(reason)
        self.reason, self.case, self.examples, self.script = reason, case, examples, script

    def __str__(self) -> str:
        text = f"{self.reason}\n  smallest case: {self.case!r}\n  first seen in example {self.examples}"
        return f"{text}\n\n{self.script}" if self.script else text


@dataclass
class Report:
    """What was tried on a kernel that was not broken.

    Attributes
    ----------
    operation, dtype : str
    examples : int
        Cases that were tried.
    worst : dict
        For each result and gradient the largest error, in units of its tolerance, and the case where it was.
    held : Counter
        How often each law was tried.
    skipped : Counter
        Why laws were not tried, and how often.
    seconds : float
    seed : int
    """

    operation: str
    dtype: str
    seed: int
    examples: int = 0
    worst: dict[str, tuple[float, Case]] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def note(self, found: Difference, case: Case) -> None:
        """Remember a comparison if it is the worst of its name."""
        if found.name not in self.worst or found.units > self.worst[found.name][0]:
            self.worst[found.name] = (found.units, case)

    def __str__(self) -> str:
        lines = [
            f"{self.operation}, {self.dtype}: not broken by {self.examples} cases in {self.seconds:.1f} s",
            f"  the same cases again: seed {self.seed}",
            "  largest error in units of what rounding allows:",
        ]
        lines += [f"    {name:<14} {units:.2g}   {case!r}" for name, (units, case) in sorted(self.worst.items())]
        if self.held:
            lines.append(f"  {len(self.held)} laws held, {sum(self.held.values())} checks")
        lines += [f"  not asked {count} times: {why}" for why, count in self.skipped.most_common()]
        return "\n".join(lines)


def check_scan(
    fn: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    dtype: Any = np.float32,
    discretization: str | None = None,
    nonfinite: bool = False,
    float64: bool = True,
    max_examples: int = 200,
    seed: int | None = None,
    capabilities: Capabilities | None = None,
    target: str | None = None,
    **restrictions: Any,
) -> Report:
    """Try to break a selective scan.

    Parameters
    ----------
    fn : callable
        Called with NumPy arrays and keywords as ``npmamba.selective_scan`` is; returns y, or y and the last state.
        `npmamba.testing.adapters.adapted` makes such a function of one of another library. What its signature lacks is
        not asked of it.
    backward : callable, optional
        ``backward(dout=dout, **arguments)`` returns the gradients by name, a dictionary or a named tuple.
    step : callable, optional
        Like ``npmamba.selective_state_update``: one step, which changes the state it is given.
    dtype : dtype
        Of u, delta, z, B and C: float16, bfloat16, float32 or float64.
    discretization : {"euler", "zoh"}, optional
        What `fn` computes if it has no such argument; "euler" by default.
    nonfinite : bool
        Whether `fn` is to take NaN, infinities and A = -inf too, and to pass them on where the equations do and nowhere
        else.
    float64 : bool
        Whether `fn` computes in float64 where it is given that. Some laws of gradients ask for it, whatever `dtype` is,
        for differences of float32 tell little.
    max_examples : int
        Cases to try.
    seed : int, optional
        Draws the same cases again; by default others each time.
    capabilities : Capabilities, optional
        What `fn` can be asked, where its signature does not tell.
    target : str, optional
        ``module:function``, for the script that shows a failure.
    **restrictions
        Of what is drawn, as for `strategies.scan_cases`: ``dims=(16, 32)``, ``reverse=False``, ``layouts=("C",)``.

    Returns
    -------
    Report
        What was tried, and the largest errors.

    Raises
    ------
    Counterexample
        An AssertionError that carries the smallest case that was found.

    Examples
    --------
    >>> import npmamba
    >>> report = check_scan(npmamba.selective_scan, max_examples=10, seed=0, max_size=300)
    >>> report.examples, report.worst["y"][0] < 1
    (10, True)

    A softplus that loses small steps:

    >>> def naive(u, delta, A, B, C, *, delta_softplus=False):
    ...     with np.errstate(over="ignore"):
    ...         delta = np.log(1 + np.exp(delta)).astype(delta.dtype) if delta_softplus else delta
    ...     return npmamba.selective_scan(u, delta, A, B, C)
    >>> try:
    ...     check_scan(naive, seed=0, max_size=300)
    ... except Counterexample as found:
    ...     print(found.reason.partition(":")[0])
    the step is the softplus of delta plus bias
    """
    if capabilities is None:
        capabilities = Capabilities.of(fn, last_state=_has_last_state(fn))
    capabilities = replace(
        capabilities, backward=backward or capabilities.backward, step=step or capabilities.step, nonfinite=nonfinite,
        float64=float64 and capabilities.float64, strides=_strides(capabilities, restrictions),
        rules=capabilities.rules if discretization is None else (discretization,),
        maps=_maps(capabilities, restrictions),
    )  # fmt: skip
    # a rate that is NaN may or may not meet what is not there: the state before a sequence
    cases = strategies.scan_cases(**_askable(capabilities) | restrictions).filter(
        lambda case: case.special is None or case.special[0] != "A" or _begins_with_a_state(case.options)
    )
    scan, laws = Scan(fn, capabilities), (*LAWS, *(GRADIENT_LAWS if capabilities.backward else ()))

    def examine(case: ScanCase, report: Report) -> None:
        arguments = case.arguments(dtype)
        with _answering(case):
            found = [x for x in scan(arguments) if x is not None]
        for one in compare(found, exact_scan(arguments), tolerance.scan_tolerance(arguments)):
            _judge(one, case, report)
        if capabilities.backward is not None and not case.special:
            _judge_gradients(scan, case, dtype, report)
        _try_laws(laws, fn, arguments, capabilities, case, report)

    return _search("selective_scan", examine, cases, dtype, max_examples, seed, target)


def check_conv1d(
    fn: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
    dtype: Any = np.float32,
    nonfinite: bool = False,
    float64: bool = True,
    max_examples: int = 200,
    seed: int | None = None,
    capabilities: Capabilities | None = None,
    target: str | None = None,
    **restrictions: Any,
) -> Report:
    """Try to break a causal convolution, called as ``npmamba.causal_conv1d`` is; the rest as for `check_scan`.

    `step` is like ``npmamba.causal_conv1d_update``: it changes the state it is given. The laws stand in
    `npmamba.testing.conv_laws` and `conv_gradient_laws`.

    >>> import npmamba
    >>> report = check_conv1d(npmamba.causal_conv1d, max_examples=10, seed=0, max_size=300)
    >>> report.examples, "the_future_does_not_reach_the_past" in report.held
    (10, True)
    """
    known = Conv.read_off(fn) if capabilities is None else capabilities
    capabilities = replace(
        known, backward=backward or known.backward, step=step or known.step, nonfinite=nonfinite,
        float64=float64 and known.float64, strides=_strides(known, restrictions),
    )  # fmt: skip
    off: dict[str, Any] = {"bias": False, "activation": None, "initial_state": False, "seq_idx": None, "reverse": False}
    asked_for: dict[str, Any] = {"special": ("nan",) if nonfinite else False}
    if not capabilities.strides:
        asked_for["layouts"] = ("C",)
    drawn = strategies.conv_cases(**_untaken(fn, off) | asked_for | restrictions)
    # a weight that is NaN may or may not meet what is not there: the steps before a sequence
    cases = drawn.filter(lambda case: not case.special or case.special[0] != "weight")
    conv = Conv(fn, capabilities)
    laws = (*CONV_LAWS, *(CONV_GRADIENT_LAWS if capabilities.backward else ()))

    asked = {"return_last_state": takes(fn, "return_last_state")}

    def examine(case: ConvCase, report: Report) -> None:
        arguments = case.arguments(dtype)
        _try_laws(laws, fn, arguments, capabilities, case, report)
        with _raising(case):
            found = outputs(fn, arguments | asked)
        for one in compare(found, exact_conv(arguments), tolerance.conv_tolerance(arguments)):
            _judge(one, case, report)
        if capabilities.backward is not None and not case.special:
            dout, dlast_state = case.cotangents(dtype)
            dlast_state = dlast_state if len(found) > 1 else None
            expected = causal_conv1d.backward(dout, **arguments, dlast_state=dlast_state)
            allowed = tolerance.conv_gradient_tolerance(dout, arguments, dlast_state)
            with _answering(case):
                got = conv.gradients(arguments, dout, dlast_state)
            _judge_all(got, expected, allowed, case, report)

    return _search("causal_conv1d", examine, cases, dtype, max_examples, seed, target)


def check_state_update(
    fn: Callable[..., Any],
    *,
    dtype: Any = np.float32,
    nonfinite: bool = False,
    float64: bool = True,
    max_examples: int = 200,
    seed: int | None = None,
    capabilities: Capabilities | None = None,
    target: str | None = None,
    **restrictions: Any,
) -> Report:
    """Try to break one step of a scan, called as ``npmamba.selective_state_update`` is: it changes `state`.

    A few steps, one after the other, are a scan, of which every law of scans must hold.

    >>> import npmamba
    >>> report = check_state_update(npmamba.selective_state_update, max_examples=10, seed=0, max_size=300)
    >>> report.examples, "a_step_of_no_length_keeps_the_state" in report.held
    (10, True)
    """
    off: dict[str, Any] = {"D": False, "z": False, "dt_bias": False, "dt_softplus": False, "discretization": "euler"}
    asked: dict[str, Any] = {"special": ("nan",) if nonfinite else False}
    known = as_scan(fn)[1] if capabilities is None else capabilities
    if not known.strides:
        asked["layouts"] = ("C",)
    cases = strategies.update_cases(**_untaken(fn, off) | asked | restrictions)
    known = replace(
        known, nonfinite=nonfinite, float64=float64, maps=_maps(known, restrictions),
        strides=_strides(known, restrictions),
    )  # fmt: skip
    scan, _ = as_scan(fn, strides=known.strides)

    def examine(case: UpdateCase, report: Report) -> None:
        arguments = case.arguments(dtype)
        _try_laws(STEP_LAWS, scan, scan_case(case).arguments(dtype), known, case, report)
        with _raising(case):
            found = outputs(fn, arguments)
        for one in compare(found, exact_update(arguments), tolerance.update_tolerance(arguments)):
            _judge(one, case, report)

    return _search("selective_state_update", examine, cases, dtype, max_examples, seed, target)


# --- the search ---


def _try_laws(
    laws: Iterable[Law], fn: Callable[..., Any], arguments: dict[str, Any], capabilities: Capabilities, case: Case,
    report: Report,
) -> None:  # fmt: skip
    """Try laws on a case; note which held, and why others were not asked."""
    for law in laws:
        outcome = law.examine(fn, arguments, np.random.default_rng(case.seed), capabilities)
        if outcome.violation is not None:
            raise Counterexample(str(outcome.violation), case)
        report.held[law.name] += not outcome.skipped
        report.skipped[outcome.skipped] += outcome.skipped.startswith(f"the {law.kind.what}")


def _search(
    operation: str, examine: Callable[[Any, Report], None], cases: Any, dtype: Any, max_examples: int,
    seed: int | None, target: str | None,
) -> Report:  # fmt: skip
    """Examine cases until one fails, then smaller ones; return the report, or raise the smallest failure."""
    seed = int(np.random.default_rng().integers(2**32)) if seed is None else seed
    report = Report(operation, np.dtype(dtype).name, seed)
    first: list[int] = []
    smallest: list[Counterexample] = []
    began = time.perf_counter()

    @hypothesis.seed(seed)
    @settings(
        max_examples=max_examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    @hypothesis.given(cases)
    def search(case: Any) -> None:
        report.examples += not first
        try:
            examine(case, report)
        except Counterexample as broken:
            first.append(report.examples)
            smallest[:] = [broken]
            raise

    try:
        search()
    except (Counterexample, hypothesis.errors.Flaky):
        broken = smallest[0]
    else:
        report.seconds = time.perf_counter() - began
        report.held, report.skipped = +report.held, +report.skipped
        return report
    script = broken.case.script(target, dtype) if target else ""
    raise Counterexample(broken.reason, broken.case, first[0], script) from None


def _judge(one: Difference, case: Case, report: Report) -> None:
    if one.units > 1:
        raise Counterexample(str(one), case)
    report.note(one, case)


def _judge_all(got: dict[str, Any], expected: Any, allowed: Any, case: Case, report: Report) -> None:
    """Compare gradients by name; `expected` and `allowed` are named tuples with None where there is no argument."""
    for name, value in expected._asdict().items():
        if value is not None:
            _judge(difference(f"d{name}", got[name], value, getattr(allowed, name)), case, report)


def _judge_gradients(scan: Scan, case: ScanCase, dtype: Any, report: Report) -> None:
    arguments, (dout, dlast_state) = case.arguments(dtype), case.cotangents(dtype)
    dlast_state = dlast_state if scan.can("last_state") else None
    expected = selective_scan.backward(dout, **arguments, dlast_state=dlast_state)
    allowed = tolerance.gradient_tolerance(dout, arguments, dlast_state)
    with _answering(case):
        got = scan.gradients(arguments, dout, dlast_state)
    _judge_all(got, expected, allowed, case, report)


# --- what a kernel can be asked ---


def _begins_with_a_state(options: Any) -> bool:
    return bool(options.initial_state) and options.seq_idx is None


def _untaken(fn: Callable[..., Any], off: dict[str, Any]) -> dict[str, Any]:
    """Return the options, at their defaults, that a function does not take."""
    return {name: value for name, value in off.items() if not takes(fn, name)}


def _has_last_state(fn: Callable[..., Any]) -> bool:
    """Tell whether a scan returns its last state, by asking for the smallest one."""
    one = np.ones((1, 1, 1), np.float32)
    asked = {"return_last_state": True} if takes(fn, "return_last_state") else {}
    with contextlib.suppress(Exception):
        return isinstance(fn(u=one, delta=one, A=-one[0], B=one, C=one, **asked), tuple)
    return False


_KINDS = {MAPS[3]: "variable", MAPS[2]: "constant", MAPS[4]: "grouped"}
"""What strategies call the shapes of B and C."""


def _maps(capabilities: Capabilities, restrictions: dict[str, Any]) -> tuple[str, ...]:
    """Return the shapes of maps that a scan takes; what B and C are restricted to, it is not asked beyond."""
    kinds = set(_KINDS.values())
    for name in {"B", "C"} & restrictions.keys():
        value = restrictions[name]
        values = value if isinstance(value, list | tuple | set | frozenset) else [value]
        kinds &= {kind if isinstance(kind, str) else "grouped" for kind in values}
    return tuple(name for name in capabilities.maps if _KINDS[name] in kinds)


def _strides(capabilities: Capabilities, restrictions: dict[str, Any]) -> bool:
    """Tell whether arrays may lie in any memory: not where all cases are asked for in C order."""
    asked = restrictions.get("layouts")
    return capabilities.strides and not (asked and {*asked} <= {"C", "readonly"})


def _askable(capabilities: Capabilities) -> dict[str, Any]:
    """Return what cases may be drawn for a scan."""
    off: dict[str, Any] = dict.fromkeys(("D", "z", "delta_bias", "delta_softplus", "initial_state", "reverse"), False)
    off["seq_idx"] = None
    asked = {name: value for name, value in off.items() if name not in capabilities.keywords}
    maps = [kind for name, kind in _KINDS.items() if name in capabilities.maps]
    asked |= {"B": maps, "C": maps, "discretization": list(capabilities.rules)}
    asked["special"] = ("nan",) if capabilities.nonfinite else False
    if not capabilities.strides:
        asked["layouts"] = ("C",)
    return asked


@contextlib.contextmanager
def _answering(case: Case) -> Iterator[None]:
    """Turn a call that raised, or returned another shape, into a verdict."""
    try:
        yield
    except Broken as broken:
        raise Counterexample(str(broken), case) from broken.__cause__


@contextlib.contextmanager
def _raising(case: Case) -> Iterator[None]:
    """Turn what a kernel raises into a verdict."""
    try:
        yield
    except Exception as error:
        raise Counterexample(f"the call raised {type(error).__name__}: {error}", case) from error
