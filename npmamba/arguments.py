"""What the ``npmamba`` command understands. Nothing heavy is imported here: ``--help`` is instant."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from npmamba.settings import TrainConfig, flag, nearest

FAILED = 2


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


def parser() -> Parser:
    """Return the parser of the whole command line."""
    text = "Mamba on NumPy: train a model, let it write, look inside."
    top = Parser(prog="npmamba", description=text, allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _add_train(commands)
    _add_generate(commands)
    doctor = commands.add_parser("doctor", help="say what works here, and why the rest does not")
    doctor.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    warmup = commands.add_parser("warmup", help="compile all kernels now, for the CPU and, if there is one, the GPU")
    warmup.add_argument("--float64", action="store_true", help="those for float64 too")
    warmup.add_argument("--bfloat16", action="store_true", help="those for bfloat16 too, of a GPU; the CPU has none")
    _add_fuzz(commands)
    for command in commands.choices.values():
        command.allow_abbrev = False
        command.add_argument("--threads", type=_count, metavar="N", help="threads (default: all cores)")
    return top


def _add_fuzz(commands: Any) -> None:
    fuzz = commands.add_parser("fuzz", help="try to break a kernel: yours, ours or any other")
    add = fuzz.add_argument
    add("target", metavar="TARGET", help="the kernel, as module:function")
    add("--operation", choices=("scan", "conv1d", "update"), default="scan", help="what it computes (default: scan)")
    add("--backward", metavar="TARGET", help="its backward pass: dout and the arguments to gradients by name")
    add("--step", metavar="TARGET", help="of a scan: its single step, which changes the state it is given")
    add("--examples", type=_count, default=200, metavar="N", help="cases to try (default: 200)")
    dtypes = ("float16", "bfloat16", "float32", "float64")
    add("--dtype", choices=dtypes, default="float32", help="dtype of u (default: float32)")
    add("--discretization", choices=("euler", "zoh"), help="its rule, if it has no such argument")
    maps = ("variable", "constant", "grouped")
    add("--maps", choices=maps, nargs="+", help="shapes of B and C that a scan or step takes (default: all)")
    libraries = ("numpy", "torch", "jax", "cupy")
    add("--library", choices=libraries, default="numpy", help="whose arrays it takes (default: numpy)")
    add("--device", help="a device of PyTorch, such as cuda")
    orders = ("batch dim seqlen", "batch seqlen dim")
    add("--order", choices=orders, default=orders[0], help=f"order of its axes (default: {orders[0]!r})")
    add("--name", action="append", default=[], metavar="OURS=THEIRS", type=_pair, help="its name of an argument")
    add("--without", action="append", default=[], metavar="OPTION", help="leave an option, layouts or float64 out")
    for name, what in (("batches", "rows"), ("dims", "channels"), ("lengths", "steps"), ("dstates", "states"),
                       ("widths", "taps")):  # fmt: skip
        add(f"--{name}", type=_count, nargs="+", metavar="N", help=f"numbers of {what} to choose from")
    add("--max-size", type=_count, metavar="N", help="the most that all sizes multiply to (default: 100000)")
    add("--magnitudes", nargs="+", metavar="NAME", help="sizes of numbers to choose from, such as tame (default: all)")
    add("--nonfinite", action="store_true", help="ask a scan for NaN, infinities and A = -inf too")
    add("--seed", type=int, help="draw the same cases again")
    add("--script", metavar="FILE", help="where to write the program that shows a failure")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, got {text!r}")
    return int(text)


def _pair(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"must be OURS=THEIRS, got {text!r}")
    return text


_GROUPS = {
    "text": "vocab context batch seed",
    "model": "d_model layers d_state dropout dtype backend",
    "optimization": "steps minutes lr warmup weight_decay clip",
    "run": "out eval_every checkpoint_every sample_length prompt",
}
_EXAMPLES = """examples:
  npmamba train                         learn Python's own library for two and a half minutes
  npmamba train book.txt --minutes 10   learn a book
  npmamba train --resume runs/book-1    go on after Ctrl-C or a crash
"""


def _add_train(commands: Any) -> None:
    text = "Train a language model on a text, let it write a sample, and draw a report (report.html)."
    shape = argparse.RawDescriptionHelpFormatter
    train = commands.add_parser(
        "train", help="train a model on a text", description=text, epilog=_EXAMPLES, formatter_class=shape
    )
    settings = TrainConfig.__dataclass_fields__
    train.add_argument("source", nargs="?", metavar="TEXT", help=settings["source"].metadata["help"])
    for title, names in _GROUPS.items():
        group = train.add_argument_group(title)
        for name in names.split():
            _add_setting(group, settings[name])
    group.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; options given here win over it"
    )
    group.add_argument("--resume", metavar="DIR", help="go on with a run, exactly as if it had not stopped")
    group.add_argument("--no-report", action="store_true", help="write no report.html")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _add_setting(group: Any, f: Any) -> None:
    default = "" if f.default is None else f" (default: {f.default})"
    kind, choices = f.metadata["kind"], f.metadata["choices"]
    shape = {"choices": choices} if choices else {"metavar": {int: "N", float: "X", str: "S"}[kind]}
    group.add_argument(flag(f.name), dest=f.name, type=kind, help=f.metadata["help"] + default, **shape)


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
    backend = TrainConfig.__dataclass_fields__["backend"].metadata
    add("--backend", choices=backend["choices"], default="numpy", help=backend["help"] + " (default: numpy)")
    kinds = ("float16", "bfloat16", "float32", "float64")
    add("--dtype", choices=kinds, help="type of weights; the half types are for GPUs (default: as stored)")
