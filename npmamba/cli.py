"""The ``npmamba`` command: train, generate, doctor, warmup, fuzz.

Nothing heavy is imported before a command needs it, so ``--help`` is instant; and as this is the program, not
the library, it may choose the thread settings that must stand in the environment before NumPy is loaded.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from npmamba.arguments import FAILED, parser
from npmamba.settings import TrainConfig, read_toml

STARTED = time.perf_counter()
INTERRUPTED = 130
_SUFFIXES = {"ok": "ok", "missing": "--", "broken": "!!"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if something is broken, 2 after an error, 130 after Ctrl-C."""
    understood = parser()
    args = understood.parse_args(argv)
    if args.version:
        from npmamba import __version__

        print(__version__)
        return 0
    if args.command is None:
        understood.print_help()
        return 0
    set_threads(args.threads)
    return _guarded(args.command, lambda: _COMMANDS[args.command](args))


def _guarded(command: str, run: Callable[[], int]) -> int:
    """Run a command; what can go wrong for a user's reasons becomes one sentence."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        return _fail(command, str(stop) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return 0
    except (ValueError, TypeError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if os.environ.get("NPMAMBA_TRACEBACK") or not _is_the_users(error):
            raise
        return _fail(command, sentence(error), FAILED)


def _is_the_users(error: Exception) -> bool:
    """Tell whether an error is for the user to mend; of all RuntimeErrors, a GPU that cannot be used."""
    from npmamba.cuda.requirements import CudaUnavailableError

    return isinstance(error, CudaUnavailableError) or not isinstance(error, RuntimeError)


def set_threads(threads: int | None) -> None:
    """Set what thread pools read when they start; what the user has set stands, unless `threads` is given.

    BLAS gets one thread: the kernels' threads divide the matrix products, see `npmamba.cpu.matmul`.
    """
    for name in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{name}_NUM_THREADS", "1")
    if threads is not None:
        os.environ["NPMAMBA_NUM_THREADS"] = str(threads)


def _fail(command: str, message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"npmamba {command}: {message}", file=sys.stderr)
    return code


def sentence(error: BaseException) -> str:
    """Say what went wrong, in words rather than error numbers."""
    if isinstance(error, OSError) and error.errno is not None:
        words = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.ENOENT: "there is no such file or folder",
            errno.EACCES: "permission denied",
            errno.EROFS: "the disk is read-only",
            errno.ENOTDIR: "a file stands where a folder is needed",
            errno.EEXIST: "a file stands where a folder is needed",
        }
        what = words.get(error.errno, error.strerror)
        return f"{error.filename}: {what}" if error.filename else str(what)
    if isinstance(error, MemoryError):
        return "not enough memory; try a smaller --batch, --context or --d-model"
    return str(error) or type(error).__name__


def _train(args: argparse.Namespace) -> int:
    given = {f.name: value for f in fields(TrainConfig) if (value := getattr(args, f.name)) is not None}
    settings = {**(read_toml(args.config) if args.config else {}), **given}
    config = None if args.resume else TrainConfig(**settings)  # checked before anything heavy is loaded
    from npmamba import progress, report, runs, summary
    from npmamba.train import train

    with progress.shown(quiet=args.quiet) as display:
        run = runs.create(config) if config else runs.resume(args.resume, settings)
        display.note(summary.opening(run))
        try:
            train(run, display, started=STARTED)
        except OSError as error:
            again = f"once that is mended, go on with: npmamba train --resume {run.folder}"
            raise OSError(f"{sentence(error)}; {again}") from error
        prompt, text = summary.sample(run)
        if not args.no_report:
            report.write(run.folder / runs.REPORT, summary.summarise(run, prompt, text))
    if not args.quiet:
        print(summary.closing(run, prompt, text, reported=not args.no_report))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from npmamba.generate import stream
    from npmamba.lm import MambaLM
    from npmamba.progress import shown
    from npmamba.streaming import load_vocabulary, pieces

    with shown():
        model = MambaLM.from_pretrained(args.checkpoint, backend=args.backend, dtype=args.dtype)
        vocabulary = load_vocabulary(args.checkpoint)
        ids, eos = vocabulary.encode(args.prompt)[None], model.config.eos_token_id
        options = {
            "temperature": args.temperature,
            "top_k": args.top_k,
            "top_p": args.top_p,
            "seed": args.seed,
        }
        drawn = stream(model, ids, args.tokens, eos_token_id=eos, **options)
        tokens = (int(token[0]) for token in drawn if token[0] != eos)
        print(args.prompt, end="", flush=True)
        for piece in pieces(vocabulary, tokens):
            print(piece, end="", flush=True)
        print()
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from npmamba.doctor import BAD, findings

    found = findings()
    if args.json:
        import json

        print(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        print(_table(found))
    return 1 if any(finding.state == BAD for finding in found) else 0


def _table(found: Sequence[Any]) -> str:
    lines: list[str] = []
    group = None
    for finding in found:
        if finding.group != group:
            lines += ["", finding.group] if lines else [finding.group]
            group = finding.group
        remedy = f"  ->  {finding.remedy}" if finding.remedy else ""
        lines.append(f"  {_SUFFIXES[finding.state]}  {finding.name:<16} {finding.detail}{remedy}")
    return "\n".join(lines)


def _warmup(args: argparse.Namespace) -> int:
    from npmamba.warmup import work

    began = time.perf_counter()
    kernels = work(["float32"] + ["float64"] * args.float64 + ["bfloat16"] * args.bfloat16)
    for number, kernel in enumerate(kernels, 1):
        print(f"\rkernel {number} of {len(kernels)}: {kernel.name:<48}", end="", flush=True)
        kernel.compile()
    print(f"\r{len(kernels)} kernels are ready after {time.perf_counter() - began:.1f} s{'':<48}")
    return 0


def _fuzz(args: argparse.Namespace) -> int:
    from npmamba.testing.fuzz import run

    text, right = run(args)
    print(text)
    return 0 if right else 1


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "generate": _generate,
    "doctor": _doctor,
    "warmup": _warmup,
    "fuzz": _fuzz,
}
