"""Fuzz npmamba's own operations, many examples each, and print what was tried and the largest errors.

    python benchmarks/fuzz_own.py --examples 10000                      # scan, convolution and step in four dtypes
    python benchmarks/fuzz_own.py --operation scan --dtype float32 --examples 1000 --rounds 10

More is asked than of somebody else's: the same bits in every memory order, for rows alone, for parts of time and for
packed sequences, and NaN, infinities and A = -inf.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import npmamba
from npmamba.ops.causal_conv1d import causal_conv1d_backward
from npmamba.ops.selective_scan import selective_scan_backward
from npmamba.testing import verdict
from npmamba.testing.conv_tools import Conv
from npmamba.testing.laws import Capabilities
from npmamba.testing.step_laws import as_scan

DTYPES = ("float32", "float64", "bfloat16", "float16")


def check(operation: str, dtype: str, examples: int, seed: int) -> verdict.Report:
    """Try to break one of our operations; raise `Counterexample` if it breaks."""
    chosen: dict[str, Any] = {"dtype": dtype, "max_examples": examples, "seed": seed}
    if operation == "scan":
        chosen["capabilities"] = Capabilities.of(npmamba.selective_scan, same_bits=True)
        chosen |= {"backward": selective_scan_backward, "step": npmamba.selective_state_update, "nonfinite": True}
        return verdict.check_scan(npmamba.selective_scan, **chosen)
    if operation == "conv1d":
        chosen["capabilities"] = Conv.read_off(npmamba.causal_conv1d, same_bits=True)
        chosen |= {"backward": causal_conv1d_backward, "step": npmamba.causal_conv1d_update, "nonfinite": True}
        return verdict.check_conv1d(npmamba.causal_conv1d, **chosen)
    _, chosen["capabilities"] = as_scan(npmamba.selective_state_update, same_bits=True)
    return verdict.check_state_update(npmamba.selective_state_update, nonfinite=True, **chosen)


def told(operation: str, dtype: str, examples: int, seed: int) -> dict[str, Any]:
    """Check, and return what to tell of it."""
    began = time.perf_counter()
    line: dict[str, Any] = {"operation": operation, "dtype": dtype, "seed": seed}
    try:
        report = check(operation, dtype, examples, seed)
    except verdict.Counterexample as found:
        line |= {"broken": found.reason, "case": repr(found.case), "example": found.examples}
    else:
        worst = {name: round(units, 3) for name, (units, _) in sorted(report.worst.items())}
        line |= {"examples": report.examples, "worst": worst, "laws": len(report.held)}
        line["checks"] = sum(report.held.values())
    return line | {"seconds": round(time.perf_counter() - began)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", action="append", choices=("scan", "conv1d", "update"))
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="as many examples again with the next seeds")
    args = parser.parse_args()
    broken = 0
    for seed in range(args.seed, args.seed + args.rounds):
        for operation in args.operation or ("scan", "conv1d", "update"):
            for dtype in args.dtype or DTYPES:
                line = told(operation, dtype, args.examples, seed)
                broken += "broken" in line
                print(json.dumps(line), flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
