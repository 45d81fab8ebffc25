"""npmamba: Mamba's selective state space model on NumPy and CuPy arrays, with no deep-learning framework.

The public names stand in `__all__`; each is imported when first used, so ``import npmamba`` costs little.
"""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

# A checkout whose links came out as text files (Windows, some archives) still finds the two top-level folders.
_ROOT = pathlib.Path(__file__).resolve().parent.parent
if not (_ROOT / "npmamba" / "autodiff").is_dir() and (_ROOT / "autodiff" / "tape.py").is_file():
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

_HOME = {
    "selective_scan": "ops.selective_scan",
    "selective_scan_backward": "ops.selective_scan",
    "selective_state_update": "ops.selective_state_update",
    "causal_conv1d": "ops.causal_conv1d",
    "causal_conv1d_backward": "ops.causal_conv1d",
    "causal_conv1d_update": "ops.causal_conv1d",
    "rms_norm": "ops.rms_norm",
    "rms_norm_backward": "ops.rms_norm",
    "cross_entropy": "ops.cross_entropy",
    "cross_entropy_backward": "ops.cross_entropy",
    "embedding": "ops.embedding",
    "embedding_backward": "ops.embedding",
    "MambaConfig": "config",
    "MambaLM": "lm",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'npmamba' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"npmamba.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
