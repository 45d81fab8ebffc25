"""Every CUDA kernel that is shipped, compiled with no device and no driver: what it takes, and what it must not hold.

The budget is cuda_budget.json; cuda_budget.py says how it is written. Each kernel is compiled to sm_80 and sm_90. So
that it takes about a minute on two cores, a plain run checks what is shipped for float32 (or a kernel's first dtype,
where it has no float32), of the convolutions those of width 4. The rest is marked `slow` and runs with
``pytest -m slow``, as in .ci/run. What was compiled before is not compiled again, so later runs take seconds.
"""

from __future__ import annotations

from typing import Any

import cuda_budget
import pytest

from npmamba.cuda import launch, requirements
from npmamba.cuda.device import arguments_of

KERNELS = {kernel.name: kernel for kernel in launch.declared()}
SECONDS = 8
"""Of the processor's time, for one architecture, where hyperthreads share a core: 5 on one that is quiet."""
SPILLING = {"scan_backward.backward"}
"""Kernels of which some registers are spilled: room for another block on a multiprocessor is worth more to them."""
SLACK = 8
"""Registers that another version of the tools may take in addition."""


def chosen(kernel: launch.Kernel, rest: bool) -> list[str]:
    """Return the names of the specializations that a plain run checks, or else of the rest."""
    first = "float32" if "float32" in kernel.dtypes else kernel.dtypes[0]

    def is_plain(found: launch.Specialization) -> bool:
        return found.dtype.name == first and not {"width=2", "width=3"} & {*found.name.split("-")}

    return [found.name for found in kernel.specializations() if is_plain(found) != rest]


def cases() -> list[Any]:
    plain = [pytest.param(name, False, id=name) for name, kernel in KERNELS.items() if chosen(kernel, False)]
    rest = [
        pytest.param(name, True, id=f"rest of {name}", marks=pytest.mark.slow)
        for name, kernel in KERNELS.items()
        if chosen(kernel, True)
    ]
    return plain + rest


@pytest.fixture(scope="session")
def compiler():
    try:
        requirements.require_compiler()
    except requirements.CudaUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiled(request, compiler):
    """The reports of everything that this run will ask for, made by as many processes as there are cores."""
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = [n for p in asked if p.keys() >= {"kernel", "rest"} for n in chosen(KERNELS[p["kernel"]], p["rest"])]
    with cuda_budget.pool() as pool:
        futures = {name: pool.submit(cuda_budget.report, name) for name in names}
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def budget():
    return cuda_budget.read()


def wrong(name: str, target: str, found: cuda_budget.Report, budget: dict[str, Any]) -> list[str]:
    """Return all that is wrong with one kernel on one architecture."""
    kernel = cuda_budget.shipped()[name]
    slack = SLACK if cuda_budget.tools() != budget["made with"] else 0
    registers, shared, *more = budget["kernels"].get(name, {}).get(target, (10_000, 10**9))
    spilled, stack = more if more and name.partition("-")[0] in SPILLING else (0, 0)
    may_hold_f64 = kernel.dtype == "float64" or "Double" in arguments_of(kernel.function).values()
    rules = {
        "not in cuda_budget.json; run python tests/cuda_budget.py": registers == 10_000,
        f"{found.registers} registers, budget {registers}": found.registers > registers + slack,
        f"{found.shared} bytes of shared memory, budget {shared}": found.shared > shared,
        f"{found.spilled} bytes of registers are spilled": found.spilled > spilled,
        f"{found.stack} bytes of stack: an array is not in registers": found.stack > stack,
        "local memory in its PTX": ".local" in found.words,
        "float64 arithmetic in its PTX: a bare number, or int times float": ".f64" in found.words and not may_hold_f64,
        f"{found.seconds:.1f} s to compile, {SECONDS} allowed": found.seconds > SECONDS,
    }
    return [f"{name} {target}: {rule}" for rule, broken in rules.items() if broken]


def test_every_rule_can_fail():
    name = next(name for name, kernel in cuda_budget.shipped().items() if kernel.dtype == "float32")
    budget = {"made with": cuda_budget.tools(), "kernels": {name: {"sm_90": [32, 1024]}}}
    good = cuda_budget.Report(32, 1024, 0, 0, [], 1.0)
    assert wrong(name, "sm_90", good, budget) == []
    assert len(wrong(name, "sm_80", good, budget)) == 1
    bad = cuda_budget.Report(33, 1025, 1, 1, [".local", ".f64"], SECONDS + 0.1)
    for field, value in bad._asdict().items():
        assert wrong(name, "sm_90", good._replace(**{field: value}), budget)
    assert len(wrong(name, "sm_90", bad, budget)) == 7
    assert wrong(name, "sm_90", good._replace(registers=33), {**budget, "made with": {}}) == []
    spilling = next(name for name in cuda_budget.shipped() if name.partition("-")[0] in SPILLING)
    budget["kernels"] |= {name: {"sm_90": [32, 1024, 8, 8]}, spilling: {"sm_90": [32, 1024, 8, 8]}}
    found = good._replace(spilled=8, stack=8)
    assert [len(wrong(name, "sm_90", found, budget)) for name in (name, spilling)] == [2, 0]
    assert len(wrong(spilling, "sm_90", good._replace(spilled=9, stack=9), budget)) == 2


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_declares_what_is_shipped(name):
    kernel = KERNELS[name]
    assert kernel.shipped, f"{name}: Kernel(..., shipped=...) must say which constants the package uses"
    defaults = kernel.constants[len(kernel.constants) - len(kernel.build.__defaults__ or ()) :]
    every = [constants for group in kernel.shipped.values() for constants in group]
    for constants in every:
        assert {*kernel.constants} - {*defaults} <= constants.keys() <= {*kernel.constants}
    assert kernel.shipped.keys() == {*kernel.dtypes}
    assert len({found.name for found in kernel.specializations()}) == len(every)


def test_no_two_kernels_share_a_name():
    assert len(KERNELS) == len(launch.declared())


def test_the_budget_lists_no_kernel_that_is_gone(budget):
    gone = sorted(budget["kernels"].keys() - cuda_budget.shipped().keys())
    assert not gone, "run python tests/cuda_budget.py"


def test_a_kernel_is_the_same_whatever_was_compiled_before_and_with_it(compiler):
    """What the architectures have in common is done once, and names are counted within a kernel."""
    from npmamba.cuda.compile import compile_machine, compile_machines

    first = next(name for name, kernel in KERNELS.items() if kernel.shipped)
    specialization = KERNELS[first].specializations()[0]
    together = list(compile_machines(*specialization, ccs=cuda_budget.ARCHITECTURES))
    for found, cc in zip(together, cuda_budget.ARCHITECTURES, strict=True):
        alone = compile_machine(*specialization, cc=cc)
        assert (found.ptx, found.code, found.name) == (alone.ptx, alone.code, alone.name)
        assert f".entry {found.name}(" in found.ptx


@pytest.mark.parametrize(("kernel", "rest"), cases())
def test_a_kernel_stays_within_its_budget(kernel, rest, compiled, budget):
    reports = {name: compiled(name) for name in chosen(KERNELS[kernel], rest)}
    problems = [wrong(name, target, one, budget) for name, found in reports.items() for target, one in found.items()]
    assert not sum(problems, []), "\n".join(sum(problems, []))
