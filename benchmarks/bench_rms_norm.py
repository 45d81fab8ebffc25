"""The root-mean-square norm: time of its kernels over the bytes that must move.

    python benchmarks/bench_rms_norm.py --gpu [--json FILE] [--shape 0] [--dtype float32]
    python benchmarks/bench_rms_norm.py [--threads 2] [--json FILE]

Forward reads x and writes y; with a residual it also reads that and writes the sum. Backward reads dy, the sum and the
sum's own gradient, if there is one, and writes dx; the weight's gradient is made on the way. The peer is PyTorch's
rms_norm, with an addition before it where there is a residual.
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
from npmamba.reference import rms_norm as reference  # noqa: E402

SHAPES = (
    (16384, 768),
    (16384, 2560),
    (65536, 128),
    (8192, 4096),
    (4096, 16384),
    (65536, 256),
    (32768, 512),
    (32768, 1024),
)
CPU_SHAPES = ((4096, 768), (1024, 2560))
EPS = 1e-5
Case = dict[str, Any]


def drawn(shape: tuple[int, int], dtype: str, fused: bool, xp: Any, seed: int) -> Case:
    """Draw dout, x, weight, residual and dresidual; the last two are None unless `fused`."""
    rng = xp.random.default_rng(seed)
    names = ("dout", "x", "residual", "dresidual") if fused else ("dout", "x")
    case = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name in names}
    return {"residual": None, "dresidual": None, **case, "weight": rng.standard_normal(shape[1], np.float32)}


def calls(case: Case) -> dict[str, Callable[[], Any]]:
    """Return the twin's forward and backward pass, without argument checks and tape."""
    kernels = twin("rms_norm", case["x"])
    inputs = case["x"], case["weight"], case["residual"]
    saved = kernels.forward(*inputs, eps=EPS, save=True)[2]
    return {
        "forward": lambda: kernels.forward(*inputs, eps=EPS, save=False),
        "backward": lambda: kernels.backward(case["dout"], case["dresidual"], saved),
    }


def torch_calls(torch: Any, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the same of PyTorch."""
    tensors = {name: moved_bytes.in_torch(torch, x) for name, x in case.items() if x is not None}
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].to(tensors["x"].dtype).requires_grad_()
    residual = tensors["residual"].requires_grad_() if "residual" in tensors else None

    def forward() -> Any:
        s = x if residual is None else x + residual
        y = torch.nn.functional.rms_norm(s, weight.shape, weight, EPS)
        return (y,) if residual is None else (y, s)

    outputs = forward()
    inputs = [t for t in (x, weight, residual) if t is not None]
    cotangents = [tensors[name] for name in ("dout", "dresidual") if name in tensors]
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True),
    }


def check(xp: Any, dtypes: list[str]) -> None:
    """Stop unless a small case agrees with the reference."""
    for dtype in dtypes:
        case = drawn((50, 768), dtype, True, xp, 0)
        (y, s, _), (dx, dweight, _) = calls(case)["forward"](), calls(case)["backward"]()
        host = {name: x.get() if hasattr(x, "get") else x for name, x in case.items()}
        dout, dresidual = host.pop("dout"), host.pop("dresidual")
        wanted = *reference.forward(**host, eps=EPS), *reference.backward(dout, **host, eps=EPS, dresidual=dresidual)
        for name, a, b in zip(("y", "s", "dx", "dweight"), (y, s, dx, dweight), wanted, strict=False):
            moved_bytes.check(f"{name} ({dtype})", a, b, 1e-5 if dtype == "float32" else 1e-2)


def main(asked: Any) -> None:
    table, torch = moved_bytes.Table("root-mean-square norm", asked), moved_bytes.torch_module(asked)
    check(table.xp, asked.dtype)
    for shape in table.shapes(SHAPES, CPU_SHAPES):
        for dtype in asked.dtype:
            size = shape[0] * shape[1] * np.dtype(dtype).itemsize
            for fused in (False, True):
                cases = [drawn(shape, dtype, fused, table.xp, n) for n in range(table.sets((2 + 2 * fused) * size))]
                own = [calls(case) for case in cases]
                others = [torch_calls(torch, case) for case in cases] if torch else []
                for name, arrays in (("forward", 4 if fused else 2), ("backward", 4 if fused else 3)):
                    peers = {"torch": [each[name] for each in others]} if others else {}
                    what = f"{shape} {dtype}{', residual' * fused}, {name}"
                    table.measure(what, arrays * size + 4 * shape[0], [each[name] for each in own], peers)
                del cases, own, others
    table.finish()


if __name__ == "__main__":
    main(ASKED)
