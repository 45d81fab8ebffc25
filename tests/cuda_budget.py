"""What every shipped CUDA kernel takes of a multiprocessor, found by compiling it: no device and no driver is needed.

``python tests/cuda_budget.py [PART OF A NAME ...]`` compiles the kernels (all, or those whose name has such a part) and
writes their registers and shared memory to cuda_budget.json, to which tests/test_cuda_offline.py holds them.
"""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from npmamba.cuda import cache, launch, requirements

FILE = Path(__file__).with_suffix(".json")
ARCHITECTURES = ((9, 0), (8, 0))
TOOLS = ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")


class Report(NamedTuple):
    """What became of one kernel."""

    registers: int
    shared: int
    spilled: int
    stack: int
    words: list[str]
    """Those of ``.f64`` and ``.local`` that its PTX contains."""
    seconds: float
    """Of the processor's time, to compile it; what architectures have in common is counted once."""


def tools() -> dict[str, str | None]:
    """Return the versions of what decides on registers."""
    return {name: requirements.version(name) for name in TOOLS}


@functools.cache
def shipped() -> dict[str, launch.Specialization]:
    """Return every specialization that the package ships, by name."""
    return {found.name: found for kernel in launch.declared() for found in kernel.specializations()}


def report(name: str) -> dict[str, Report]:
    """Compile one of `shipped` for each architecture, unless the cache of compiled kernels knows what became of it."""
    specialization = shipped()[name]
    function, _, *bounds = specialization
    file = cache.file_name(f"{name}-report", function, *bounds, ARCHITECTURES)
    kept = cache.read(file)
    if kept is None:
        kept = "report", json.dumps(_compile(specialization)).encode()
        cache.write(file, *kept)
    return {target: Report(*found) for target, found in json.loads(kept[1]).items()}


def _compile(specialization: launch.Specialization) -> dict[str, Report]:
    from npmamba.cuda.compile import compile_machines

    began, found = time.process_time(), {}
    for (major, minor), machine in zip(
        ARCHITECTURES, compile_machines(*specialization, ccs=ARCHITECTURES), strict=True
    ):
        seconds = time.process_time() - began
        words = [word for word in (".f64", ".local") if word in machine.ptx]
        found[f"sm_{major}{minor}"] = Report(*machine.resources, words, seconds)
        began = time.process_time()
    return found


def _warm_up() -> None:
    """Compile something, so that what Numba prepares once is not counted."""
    from npmamba.cuda.compile import compile_machine
    from npmamba.cuda.device import Size

    def nothing(n: Size):
        pass

    compile_machine(*launch.Kernel(lambda real: nothing, threads=32).specialize("float32"), cc=ARCHITECTURES[0])
    # a tenth of the time would go into looking for garbage among what stays
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pool() -> ProcessPoolExecutor:
    """Return as many processes as there are cores, each with a compiler at hand."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), _warm_up)


def read() -> dict[str, Any]:
    """Return the file's content."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"made with": {}, "kernels": {}}


def write(kernels: dict[str, dict[str, list[int]]]) -> None:
    """Write the file, a line for each kernel."""
    lines = [f"    {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels)]
    text = (
        f'{{\n  "made with": {json.dumps(tools())},\n  "each number": "registers, bytes of shared memory'
        '; bytes spilled and on the stack, if there are any",\n'
        '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    )
    FILE.write_text(text, encoding="utf-8")


def numbers(found: Report) -> list[int]:
    """Return what the file keeps of a report."""
    registers, shared, spilled, stack, *_ = found
    return [registers, shared, spilled, stack] if spilled or stack else [registers, shared]


def main(parts: list[str]) -> None:
    """Bring the file up to date for the kernels named by `parts`, and print what each takes."""
    chosen, measured = [name for name in shipped() if not parts or any(part in name for part in parts)], {}
    with pool() as processes:
        for name, found in zip(chosen, processes.map(report, chosen), strict=True):
            measured[name] = {target: numbers(one) for target, one in found.items()}
            for target, one in found.items():
                print(name, target, *(f"{key}={value}" for key, value in one._asdict().items()), flush=True)  # noqa: T201
    kept = {name: found for name, found in read()["kernels"].items() if name in shipped()}
    write(kept | measured)


if __name__ == "__main__":
    requirements.require_compiler()
    main(sys.argv[1:])
