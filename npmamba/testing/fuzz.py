"""``npmamba fuzz``: try to break a kernel that is named on the command line."""

from __future__ import annotations

import argparse
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from npmamba.testing import verdict
from npmamba.testing.adapters import adapted

CHECKS = {"scan": verdict.check_scan, "conv1d": verdict.check_conv1d, "update": verdict.check_state_update}


def named(target: str) -> Callable[..., Any]:
    """Return the function ``module:function``; the current folder counts as a place of modules.

    >>> named("math:sqrt")(9.0)
    3.0
    """
    module, colon, path = target.partition(":")
    if not (module and colon and path):
        raise ValueError(f"TARGET must be module:function, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"TARGET: there is no module {error.name!r}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise ValueError(f"TARGET: {module} has no {path}")
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(f"TARGET: {target} is no function but {type(found).__name__}")
    return found


def _restrictions(without: list[str]) -> dict[str, Any]:
    """Turn options that are not to be asked into restrictions of the cases."""
    values: dict[str, Any] = {"seq_idx": None, "activation": None, "discretization": "euler"}
    groups = {"layouts": ("layouts", ("C",))}  # float64 is an argument of check_scan and goes through as it is
    found: dict[str, Any] = {}
    for name in without:
        key, value = groups.get(name, (name, values.get(name, False)))
        found[key] = value
    return found


def run(args: argparse.Namespace) -> tuple[str, bool]:
    """Fuzz as the command line says; return what to tell, and whether the kernel is right as far as was seen."""
    plain = args.library == "numpy" and args.order == "batch dim seqlen" and not args.name

    def kernel(target: str) -> Callable[..., Any]:
        fn = named(target)
        if plain:
            return fn
        names = dict(pair.split("=", 1) for pair in args.name)
        return adapted(fn, args.library, order=args.order, names=names, device=args.device)

    chosen: dict[str, Any] = {"dtype": args.dtype, "max_examples": args.examples, "seed": args.seed}
    if args.operation == "scan" and args.discretization:
        chosen["discretization"] = args.discretization
    if args.operation != "conv1d" and args.maps:
        chosen |= {"B": args.maps, "C": args.maps}
    if args.operation == "scan":
        chosen["nonfinite"] = args.nonfinite
    for name in ("backward", "step"):
        if getattr(args, name):
            chosen[name] = kernel(getattr(args, name))
    sizes = ("batches", "dims", "lengths", "dstates", "widths", "max_size", "magnitudes")
    chosen |= {name: getattr(args, name) for name in sizes if getattr(args, name)}
    if plain:
        chosen["target"] = args.target
    try:
        return str(CHECKS[args.operation](kernel(args.target), **chosen, **_restrictions(args.without))), True
    except verdict.Counterexample as found:
        text = f"{args.target} is wrong\n  {found.reason}\n  smallest case: {found.case!r}"
        text += f"\n  first seen in example {found.examples}"
        if found.script and args.script:
            pathlib.Path(args.script).write_text(found.script)
            text += f"\n  to see it: python {args.script}"
        return text, False
