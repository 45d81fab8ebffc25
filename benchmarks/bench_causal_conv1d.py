"""The causal convolution: time of its kernels over the bytes that must move.

    python benchmarks/bench_causal_conv1d.py --gpu [--json FILE] [--shape 0] [--dtype float32] [--memory rows]
    python benchmarks/bench_causal_conv1d.py [--threads 2] [--json FILE]

Width 4, bias and SiLU. Forward reads x and writes y, backward reads dout and x and writes dx. "rows" is
channel-contiguous memory, half of a wider array as a model has it, "packed" the same with sequences of 128 steps packed
into rows, "lines" C-ordered (batch, dim, seqlen) memory.

On a GPU the kernels are timed alone, in a CUDA graph of calls on rotating buffers larger than the second-level cache,
and every time is held against the measured bandwidth of a large copy, and against a copy of just as many bytes, which
is what the goals mean. Times are also held against PyTorch's depthwise convolution, if PyTorch is there, and on a GPU
against the package causal_conv1d, if that is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import harness

SHAPES = ((8, 1536, 2048), (1, 1536, 8192), (8, 5120, 2048), (64, 256, 512), (1, 64, 2**20))
CPU_SHAPES = ((1, 1536, 1024), (8, 1536, 512))
DTYPES = ("float32", "bfloat16", "float16")
WIDTH, PACKED_STEPS, GOAL = 4, 128, 0.75
OPTIONS = {"activation": "silu", "reverse": False}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CuPy arrays")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    parser.add_argument("--shape", type=int, action="append", help="run only the shape of this number; may be repeated")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), action="append", help="default: first two"
    )
    parser.add_argument("--memory", choices=("rows", "packed", "lines"), action="append", help="default: all")
    parser.add_argument("--stretch", type=int, help="steps of a stretch, a multiple of 8, to see what it costs")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    ASKED = arguments()
    if not ASKED.gpu:
        harness.limit_threads(ASKED.threads)

import ml_dtypes  # noqa: E402, F401  NumPy learns bfloat16 from it
import numpy as np  # noqa: E402

from npmamba.backend import twin  # noqa: E402
from npmamba.reference import causal_conv1d as reference  # noqa: E402

Calls = dict[str, Callable[[], Any]]


def drawn(shape: tuple[int, ...], dtype: Any, memory: str, xp: Any, seed: int = 0) -> dict[str, Any]:
    """Draw x, dout, weight, bias and seq_idx; the memory of x is the second half of a wider array's rows."""
    rng = xp.random.default_rng(seed)
    batch, dim, seqlen = shape

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    def data(wide: int) -> Any:
        if memory == "lines":
            return normal(*shape).astype(dtype)
        return normal(batch, seqlen, wide * dim).astype(dtype)[..., (wide - 1) * dim :].swapaxes(1, 2)

    case = {"x": data(2), "weight": normal(dim, WIDTH), "bias": normal(dim), "seq_idx": None}
    if memory == "packed":
        case["seq_idx"] = xp.broadcast_to(xp.arange(seqlen, dtype=np.int32) // PACKED_STEPS, (batch, seqlen))
    return {**case, "dout": data(1)}


def calls(case: dict[str, Any]) -> Calls:
    """Return the twin's forward and backward pass, without argument checks and tape."""
    kernels = twin("causal_conv1d", case["x"])
    inputs = (case["x"], case["weight"], case["bias"], None)
    options = {**OPTIONS, "seq_idx": case["seq_idx"]}
    saved = kernels.forward(*inputs, **options, save=True)[2]
    return {
        "forward": lambda: kernels.forward(*inputs, **options, save=False),
        "backward": lambda: kernels.backward(case["dout"], None, saved),
    }


def check(xp: Any, memories: list[str], dtypes: list[str]) -> None:
    """Stop unless small cases agree with the reference."""
    as_numpy = np.asarray if xp is np else xp.asnumpy
    for dtype in dtypes:
        for memory in memories:
            case = drawn((2, 48, 320), dtype, memory, xp)
            found = [calls(case)["forward"]()[0], *calls(case)["backward"]()[:3]]
            host = {name: x if x is None else as_numpy(x) for name, x in case.items()}
            dout = host.pop("dout")
            wanted = [reference.forward(**host, **OPTIONS)[0], *reference.backward(dout, **host, **OPTIONS)[:3]]
            for name, x, y in zip(("y", "dx", "dweight", "dbias"), found, wanted, strict=True):
                error = np.abs(as_numpy(x).astype(np.float64) - y).max() / np.abs(y).max()
                if not error < (2e-5 if dtype == "float32" else 2e-2):
                    raise SystemExit(f"{name} of {memory} {dtype} is wrong by {error:.1e}: nothing to measure")


# --- peers ---


def torch_calls(case: dict[str, Any], device: str) -> dict[str, Calls]:
    """Return what PyTorch has for the same, and the package causal_conv1d: each on the memory order it likes best."""
    try:
        import torch
    except ImportError:
        return {}
    x = torch.from_dlpack(case["x"]).contiguous().requires_grad_()
    dout = torch.from_dlpack(case["dout"]).contiguous()
    weight, bias = (torch.from_dlpack(case[name]).to(x.dtype).requires_grad_() for name in ("weight", "bias"))
    found = {"torch conv1d": lambda: _torch_conv(torch, x, weight, bias)}
    if device == "cuda":
        try:
            from causal_conv1d import causal_conv1d_fn
        except ImportError:
            pass
        else:
            found["causal_conv1d"] = lambda: causal_conv1d_fn(x, weight, bias, activation="silu")

    def both(run: Callable[[], Any]) -> Calls:
        y = run()
        backward = lambda: torch.autograd.grad(y, (x, weight, bias), dout, retain_graph=True)  # noqa: E731
        return {"forward": run, "backward": backward}

    return {name: both(run) for name, run in found.items()}


def _torch_conv(torch: Any, x: Any, weight: Any, bias: Any) -> Any:
    dim, width = weight.shape
    full = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=dim)
    return torch.nn.functional.silu(full[..., : x.shape[2]])


# --- measuring ---


def on_gpu(asked: argparse.Namespace) -> None:
    import gpu_graph
    import gpu_timing

    from npmamba.cuda import conv_shares

    xp, bandwidth = gpu_timing.cupy, gpu_timing.copy_bandwidth()
    memories, dtypes = asked.memory or ["rows", "packed", "lines"], asked.dtype or list(DTYPES[:2])
    if asked.stretch:
        conv_shares.SHORTEST = conv_shares.LONGEST = asked.stretch
        conv_shares.AHEAD = dict.fromkeys(conv_shares.AHEAD, asked.stretch)
    settings = {**gpu_timing.described(), "copy_bandwidth": bandwidth, "stretch": asked.stretch}
    report = harness.Report("causal convolution", 1, **settings)
    print("".join(f"{name}: {what}\n" for name, what in settings.items()))
    check(xp, memories, dtypes)
    rows, goals = [], []
    for number in asked.shape or range(len(SHAPES)):
        for dtype in dtypes:
            for memory in memories:
                size = np.prod(SHAPES[number]) * np.dtype(dtype).itemsize
                cases = [drawn(SHAPES[number], dtype, memory, xp, n) for n in range(gpu_graph.buffers(2 * size, 8))]
                sets = [calls(case) for case in cases]
                for name, moved in (("forward", 2), ("backward", 3)):
                    ms = gpu_graph.kernel_milliseconds([each[name] for each in sets])
                    host = gpu_graph.host_milliseconds(sets[0][name])
                    limit, copy = 1e3 * moved * size / bandwidth, gpu_graph.copy_milliseconds(int(moved * size))
                    peers = {} if memory == "packed" else _gpu_peers(gpu_graph, cases, name)
                    told = {"shape": SHAPES[number], "dtype": dtype, "memory": memory, "operation": name}
                    times = {"ms": ms, "limit_ms": limit, "copy_ms": copy, "host_ms": host, "peers_ms": peers}
                    report.add(**told, **times, share=limit / ms)
                    others = [f"{peer} {time / ms:.1f}x" for peer, time in peers.items()]
                    what = f"{SHAPES[number]} {dtype} {memory}, {name}"
                    shares = f"{100 * limit / ms:.0f} %", f"{100 * copy / ms:.0f} %"
                    rows.append((what, f"{ms:.4f}", f"{limit:.4f}", *shares, f"{host:.3f}", ", ".join(others)))
                    goals.append((f"{what}: share of the bandwidth of a copy of as many bytes", copy / ms))
                del cases, sets
    harness.table(("", "ms", "limit", "share", "of equal copy", "host ms", "peers' time over ours"), rows)
    report.add(goals=[harness.goal(name, share, GOAL) for name, share in goals])
    report.save(asked.json)


def _gpu_peers(gpu_graph: Any, cases: list[dict[str, Any]], name: str) -> dict[str, float]:
    sets = [torch_calls(case, "cuda") for case in cases]
    return {peer: gpu_graph.torch_milliseconds([each[peer][name] for each in sets]) for peer in sets[0]}


def on_cpu(asked: argparse.Namespace) -> None:
    report = harness.Report("causal convolution", asked.threads)
    memories = asked.memory or ["rows", "packed", "lines"]
    check(np, memories, ["float32"])
    rows = []
    for shape in CPU_SHAPES:
        contenders = {memory: calls(drawn(shape, "float32", memory, np)) for memory in memories}
        contenders |= torch_calls(drawn(shape, "float32", "lines", np), "cpu")
        for name in ("forward", "backward"):
            timings = harness.alternate({who: each[name] for who, each in contenders.items()}, 9)
            for who, timing in timings.items():
                report.add(shape=shape, operation=name, contender=who, **timing.summary())
                rows.append((f"{shape} {name}, {who}", harness.ms(timing.seconds(asked.threads))))
    harness.table(("", "ms"), rows)
    report.save(asked.json)


if __name__ == "__main__":
    on_gpu(ASKED) if ASKED.gpu else on_cpu(ASKED)
