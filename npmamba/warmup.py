"""Compile kernels ahead of their first use: those for the CPU, and those for the GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


class Work(NamedTuple):
    """A kernel that is to be compiled, unless it is kept from an earlier time."""

    name: str
    compile: Callable[[], object]


def work(dtypes: Sequence[str]) -> list[Work]:
    """Return what there is to compile on this machine for arrays of some dtypes.

    Parameters
    ----------
    dtypes : sequence of str
        Of "float32", "float64", "float16", "bfloat16". The CPU's kernels compute in the first two only.

    Examples
    --------
    >>> "npmamba.cpu.causal_conv1d float32" in {kernel.name for kernel in work(["float32"])}
    True
    """
    return _for_the_cpu(dtypes) + _for_the_gpu(dtypes)


def _for_the_cpu(dtypes: Sequence[str]) -> list[Work]:
    from npmamba.cpu import runtime
    from npmamba.doctor import declare_kernels

    declare_kernels()
    computed = [name for name in dtypes if name in ("float32", "float64")]
    return [
        Work(f"{kernel.__module__} {name}", partial(kernel.__getitem__, name))
        for kernel in runtime.KERNELS
        for name in computed
    ]


def _for_the_gpu(dtypes: Sequence[str]) -> list[Work]:
    """Return the kernels that a layer of a language model uses, for the current GPU; none where there is no GPU."""
    from npmamba.cuda import launch, machine, requirements

    try:
        requirements.require_device()
    except requirements.CudaUnavailableError:
        return []
    cc = machine.architecture(machine.current_device())
    return [
        Work(f"GPU {kernel.name} {found.dtype}", partial(machine.machine_code, found, cc))
        for kernel in launch.declared()
        for found in kernel.specializations()
        if found.dtype.name in dtypes
    ]
