"""The cross entropy: time of its kernels over the bytes that must move.

    python benchmarks/bench_cross_entropy.py --gpu [--json FILE] [--shape 0] [--dtype float32]
    python benchmarks/bench_cross_entropy.py [--threads 2] [--json FILE]

Forward reads the logits, backward reads them and writes their gradient. One row in ten does not count; its logits are
not read, and not counted among the bytes. The peer is PyTorch's cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moved_bytes

if __name__ == "__main__":
    ASKED = moved_bytes.arguments(__doc__)

import ml_dtypes  # noqa: E402, F401  NumPy learns bfloat16 from it
import numpy as np  # noqa: E402

from npmamba.backend import twin  # noqa: E402
from npmamba.reference import cross_entropy as reference  # noqa: E402

SHAPES = ((8192, 50280), (16384, 65), (262144, 256), (2048, 50257), (65536, 1024))
CPU_SHAPES = ((4096, 65), (128, 50280))
IGNORED = -100
Case = dict[str, Any]


def drawn(shape: tuple[int, int], dtype: str, xp: Any, seed: int) -> Case:
    """Draw logits and labels; every tenth label is ignored."""
    rng = xp.random.default_rng(seed)
    logits = (3 * rng.standard_normal(shape, np.float32)).astype(dtype)
    labels = rng.integers(0, shape[1], shape[0])
    labels[::10] = IGNORED
    return {"logits": logits, "labels": labels, "dout": xp.ones((), np.float32)}


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the twin's forward and backward pass, without argument checks and tape."""
    kernels = twin("cross_entropy", case["logits"])
    inputs = case["logits"], case["labels"]
    saved = kernels.forward(*inputs, ignore_index=IGNORED, save=True)[1]
    return {
        "forward": lambda: kernels.forward(*inputs, ignore_index=IGNORED, save=False),
        "backward": lambda: kernels.backward(case["dout"], saved),
    }


def torch_calls(torch: Any, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the same of PyTorch."""
    logits, labels = moved_bytes.in_torch(torch, case["logits"]).requires_grad_(), torch.from_dlpack(case["labels"])
    forward = lambda: torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)  # noqa: E731
    loss = forward()
    return {"forward": forward, "backward": lambda: torch.autograd.grad(loss, logits, retain_graph=True)}


def check(xp: Any, dtypes: list[str]) -> None:
    """Stop unless small cases agree with the reference."""
    for dtype in dtypes:
        for vocab in (65, 5000):
            case = drawn((50, vocab), dtype, xp, 0)
            (loss, _), (dlogits,) = calls(case)["forward"](), calls(case)["backward"]()
            logits, labels = (x.get() if hasattr(x, "get") else x for x in (case["logits"], case["labels"]))
            moved_bytes.check(f"loss ({dtype})", loss, reference.forward(logits, labels), 1e-5)
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            moved_bytes.check(f"dlogits ({dtype})", dlogits, reference.backward(1.0, logits, labels), tolerance)


def main(asked: Any) -> None:
    table, torch = moved_bytes.Table("cross entropy", asked), moved_bytes.torch_module(asked)
    check(table.xp, asked.dtype)
    for shape in table.shapes(SHAPES, CPU_SHAPES):
        for dtype in asked.dtype:
            size = shape[0] * shape[1] * np.dtype(dtype).itemsize
            cases = [drawn(shape, dtype, table.xp, n) for n in range(table.sets(size))]
            own = [calls(case) for case in cases]
            others = [torch_calls(torch, case) for case in cases] if torch else []
            for name, arrays in (("forward", 0.9), ("backward", 1.9)):
                peers = {"torch": [each[name] for each in others]} if others else {}
                what = f"{shape} {dtype}, {name}"
                # a vocabulary that is no multiple of 16 bytes is read number by number
                whole = shape[1] % (16 // np.dtype(dtype).itemsize) == 0
                table.measure(what, arrays * size + 8 * shape[0], [each[name] for each in own], peers, goal=whole)
            del cases, own, others
    table.finish()


if __name__ == "__main__":
    main(ASKED)
