"""What the scan is compared with on a GPU, over one sequence of growing length, forward only.

Scans take a case's own arrays, float32, and do all of it: bias, softplus, D and gate. Attention and convolution mix the
same number of channels over the same length: what would stand in the scan's place in another model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_timing import cupy
from scan_gpu_case import Case

HEAD = 64
"""Channels of an attention head."""
LONGEST = {"torch loop": 8192, "torch scan": 131072}
"""Steps beyond which a peer is left out: the loop takes seconds, the scan's arrays all memory."""


def _in_torch(case: Case) -> list[Any]:
    """Return u, delta, A, B, C, D, z, delta_bias over (batch, seqlen, channels)."""
    import torch

    arrays = [torch.from_dlpack(x) for x in case.arrays.values()]
    return [x.swapaxes(1, 2) if x.ndim == 3 else x for x in arrays]


def _call(scan: Callable[..., Any], case: Case) -> Callable[[], Any]:
    import torch

    arrays = _in_torch(case)

    def call() -> Any:
        with torch.inference_mode():
            return scan(*arrays)

    return call


def torch_loop(case: Case) -> Callable[[], Any]:
    """A loop over time in PyTorch, the step in two fused calls."""
    return _call(_loop, case)


def _loop(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
    import torch
    from torch.nn import functional

    delta = functional.softplus(delta + bias)
    h, outputs = u.new_zeros(u.shape[0], *A.shape), []
    for u_t, dt, B_t, C_t in zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        h = torch.addcmul((dt * u_t).unsqueeze(-1) * B_t.unsqueeze(1), torch.exp(dt.unsqueeze(-1) * A), h)
        outputs.append(torch.bmm(h, C_t.unsqueeze(-1)).squeeze(-1))
    return torch.addcmul(torch.stack(outputs, 1), u, D) * functional.silu(z)


def torch_scan(case: Case) -> Callable[[], Any]:
    """The unfused parallel scan in PyTorch: all decays and states in memory, combined over distances 1, 2, 4, ..."""
    return _call(_doubling, case)


def _doubling(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Any:
    import torch
    from torch.nn import functional

    delta = functional.softplus(delta + bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    h = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    distance = 1
    while distance < u.shape[1]:
        h[:, distance:] += decay[:, distance:] * h[:, :-distance]
        decay[:, distance:] *= decay[:, :-distance].clone()
        distance *= 2
    return torch.addcmul(h.mul_(C.unsqueeze(2)).sum(-1), u, D) * functional.silu(z)


def flash_attention(case: Case) -> Callable[[], Any]:
    """FlashAttention as PyTorch ships it: causal, bfloat16, heads of 64 channels."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, dim, seqlen = case.shape
    shape, kind = (batch, dim // HEAD, seqlen, HEAD), {"dtype": torch.bfloat16, "device": "cuda"}
    q, k, v = (torch.randn(shape, **kind) for _ in range(3))

    def call() -> Any:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def fft_convolution(case: Case) -> Callable[[], Any]:
    """A convolution as long as the sequence, float32, by cuFFT; the filter's transform is there already."""
    batch, dim, seqlen = case.shape
    x, taps = (cupy.random.standard_normal(shape, dtype=np.float32) for shape in (case.shape, (dim, seqlen)))
    filters = cupy.fft.rfft(taps, n=2 * seqlen)
    return lambda: cupy.fft.irfft(cupy.fft.rfft(x, n=2 * seqlen) * filters, n=2 * seqlen)[..., :seqlen]


SCANS: dict[str, Callable[[Case], Callable[[], Any]]] = {"torch loop": torch_loop, "torch scan": torch_scan}
PEERS = SCANS | {"FlashAttention": flash_attention, "FFT convolution": fft_convolution}


def release() -> None:
    """Give the memory back that a peer has left in a pool."""
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    cupy.fft.config.get_plan_cache().clear()
    cupy.get_default_memory_pool().free_all_blocks()
