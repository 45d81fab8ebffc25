"""The token embedding: time of its kernels over the bytes that must move.

    python benchmarks/bench_embedding.py --gpu [--json FILE] [--shape 0] [--dtype float32]
    python benchmarks/bench_embedding.py [--threads 2] [--json FILE]

Forward reads the rows that occur, once, and writes one for each token; backward reads one for each token and writes the
whole table's gradient; both read the ids. Small ids come often, as words do; in one case all tokens are the same. The
peer is PyTorch's embedding.
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
from npmamba.reference import embedding as reference  # noqa: E402

SHAPES = (
    (16384, 65, 384, 3),
    (8192, 50280, 768, 3),
    (131072, 50280, 768, 3),
    (131072, 50280, 768, 1),
    (16384, 50280, 768, 1000),
)
"""Tokens, rows of the table, channels, and the power that draws ids together: 1 is even, with 1000 almost all are 0."""
CPU_SHAPES = ((4096, 65, 384, 3), (4096, 50280, 768, 3))
Case = dict[str, Any]


def drawn(shape: tuple[int, ...], dtype: str, xp: Any, seed: int) -> Case:
    """Draw the table, ids, and the result's gradient."""
    tokens, vocab, d_model, power = shape
    rng = xp.random.default_rng(seed)
    weight = rng.standard_normal((vocab, d_model), np.float32).astype(dtype)
    ids = (vocab * rng.random(tokens) ** power).astype(np.int64)
    return {"weight": weight, "ids": ids, "dout": rng.standard_normal((tokens, d_model), np.float32).astype(dtype)}


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the twin's forward and backward pass, without argument checks and tape."""
    kernels = twin("embedding", case["weight"])
    saved = kernels.Saved(case["ids"], len(case["weight"]))
    return {
        "forward": lambda: kernels.forward(case["weight"], case["ids"], save=False),
        "backward": lambda: kernels.backward(case["dout"], saved),
    }


def torch_calls(torch: Any, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the same of PyTorch."""
    weight, dout = (moved_bytes.in_torch(torch, case[name]) for name in ("weight", "dout"))
    weight, ids = weight.requires_grad_(), torch.from_dlpack(case["ids"])
    forward = lambda: torch.nn.functional.embedding(ids, weight)  # noqa: E731
    out = forward()
    return {"forward": forward, "backward": lambda: torch.autograd.grad(out, weight, dout, retain_graph=True)}


def check(xp: Any, dtypes: list[str]) -> None:
    """Stop unless small cases agree with the reference."""
    for dtype in dtypes:
        for vocab in (5, 700):
            case = drawn((300, vocab, 24, 3), dtype, xp, 0)
            (out, _), (dweight,) = calls(case)["forward"](), calls(case)["backward"]()
            weight, ids, dout = (x.get() if hasattr(x, "get") else x for x in case.values())
            moved_bytes.check(f"rows ({dtype})", out, reference.forward(weight, ids), 0)
            tolerance = 1e-5 if dtype == "float32" else 1e-2
            moved_bytes.check(f"dweight ({dtype})", dweight, reference.backward(dout, ids, vocab), tolerance)


def main(asked: Any) -> None:
    table, torch = moved_bytes.Table("embedding", asked), moved_bytes.torch_module(asked)
    check(table.xp, asked.dtype)
    for shape in table.shapes(SHAPES, CPU_SHAPES):
        tokens, vocab, d_model, power = shape
        for dtype in asked.dtype:
            row = d_model * np.dtype(dtype).itemsize
            cases = [drawn(shape, dtype, table.xp, n) for n in range(table.sets((tokens + vocab) * row))]
            occurring = int(table.xp.unique(cases[0]["ids"]).size)
            own = [calls(case) for case in cases]
            others = [torch_calls(torch, case) for case in cases] if torch else []
            for name, rows in (("forward", tokens + occurring), ("backward", tokens + vocab)):
                peers = {"torch": [each[name] for each in others]} if others else {}
                what = f"{tokens} tokens, {vocab} x {d_model}, {occurring} occur, {dtype}, {name}"
                moved = rows * row + 8 * tokens
                table.measure(what, moved, [each[name] for each in own], peers, goal=moved > 1e8 and power < 10)
            del cases, own, others
    table.finish()


if __name__ == "__main__":
    main(ASKED)
