"""The ``npmamba`` command: train, generate, doctor, warmup.

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
from typing import Any, NoReturn

from npmamba.settings import TrainConfig, flag, nearest, read_toml

STARTED = time.perf_counter()
FAILED, INTERRUPTED = 2, 130
_SUFFIXES = {"ok": "ok", "missing": "--", "broken": "!!"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the nearest option there is."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse unknown options here, where the options of the command in question are known."""
        found, extra = super().parse_known_args(args, namespace)
        if extra:
            name = extra[0].split("=")[0]
            what = "unknown option" if name.startswith("-") else "unexpected argument"
            self.error(f"{what} {name}" + nearest(name, self._option_string_actions))
        return found, extra

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with code 2."""
        if "invalid choice: " in message:
            before, _, after = message.partition(" (choose from ")
            choices = [word.strip("' )") for word in after.split(",")]
            wrong = before.rpartition("invalid choice: ")[2].strip("'")
            message = before + (nearest(wrong, choices) or f"; choose from {', '.join(choices)}")
        self.exit(FAILED, f"{self.prog}: {message.removeprefix('argument ')}\n")


def _parser() -> Parser:
    text = "Mamba on NumPy: train a model, let it write, look inside."
    parser = Parser(prog="npmamba", description=text, allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_train(commands)
    _add_generate(commands)
    doctor = commands.add_parser("doctor", help="say what works here, and why the rest does not")
    doctor.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    commands.add_parser("warmup", help="compile all kernels now").add_argument(
        "--float64", action="store_true", help="those for float64 too"
    )
    for command in commands.choices.values():
        command.allow_abbrev = False
        command.add_argument("--threads", type=_threads, metavar="N", help="threads (default: all cores)")
    return parser


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def _add_train(commands: Any) -> None:
    text = "Train a language model on a text, let it write a sample, and draw a report (report.html)."
    train = commands.add_parser("train", help="train a model on a text", description=text)
    source, *options = fields(TrainConfig)
    train.add_argument("source", nargs="?", metavar="TEXT", help=source.metadata["help"])
    for f in options:
        default = "" if f.default is None else f" (default: {f.default})"
        kind, choices = f.metadata["kind"], f.metadata["choices"]
        shape = {"choices": choices} if choices else {"metavar": {int: "N", float: "X", str: "S"}[kind]}
        train.add_argument(flag(f.name), dest=f.name, type=kind, help=f.metadata["help"] + default, **shape)
    train.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; options given here win over it"
    )
    train.add_argument("--resume", metavar="DIR", help="go on with a run, exactly as if it had not stopped")
    train.add_argument("--no-report", action="store_true", help="write no report.html")
    train.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_generate(commands: Any) -> None:
    text = "Continue a text with a trained model; it appears as it is drawn."
    generate = commands.add_parser("generate", help="write text with a trained model", description=text)
    add = generate.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder of a run or of a published model")
    add("--prompt", default="\n", metavar="S", help="text to continue (default: a new line)")
    add("--tokens", type=int, default=500, metavar="N", help="how many to draw (default: 500)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default: 0.8)")
    add("--top-k", type=int, default=0, metavar="N", help="draw from the N likeliest (default: 0, no limit)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw from the likeliest that sum to X (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: a new one)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        from npmamba import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
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
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("NPMAMBA_TRACEBACK"):
            raise
        return _fail(command, sentence(error), FAILED)


def set_threads(threads: int | None) -> None:
    """Set what thread pools read when they start; what the user has set stands, unless `threads` is given."""
    os.environ.setdefault(
        "OPENBLAS_THREAD_TIMEOUT", "4"
    )  # idle workers must not keep the kernels' cores busy
    if threads is not None:
        for name in ("NPMAMBA", "OMP", "OPENBLAS", "MKL"):
            os.environ[f"{name}_NUM_THREADS"] = str(threads)


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
        model = MambaLM.from_pretrained(args.checkpoint)
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
    from npmamba.cpu import runtime
    from npmamba.doctor import declare_kernels

    began, names = time.perf_counter(), ["float32", *(["float64"] if args.float64 else [])]
    declare_kernels()
    work = [(kernel, name) for kernel in runtime.KERNELS for name in names]
    for number, (kernel, name) in enumerate(work, 1):
        print(f"\rkernel {number} of {len(work)}: {kernel.__module__} {name:<24}", end="", flush=True)
        kernel[name]
    print(f"\r{len(work)} kernels are ready after {time.perf_counter() - began:.1f} s{'':<40}")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "generate": _generate,
    "doctor": _doctor,
    "warmup": _warmup,
}
