"""Gradients by a small tape, and optimizers as pure functions; `tape.md` explains how it works."""

from __future__ import annotations

from npmamba.autodiff import algebra as algebra  # gives traced values their operators
from npmamba.autodiff.check import check_complex_step, check_vjp, complex_step_gradient
from npmamba.autodiff.optim import (
    adamw,
    clip_by_global_norm,
    clip_factor,
    decay_mask,
    global_norm,
    sgd,
    warmup_cosine,
)
from npmamba.autodiff.tape import Traced, primitive, pullback, value_and_grad, value_of
from npmamba.autodiff.tree import tree_items, tree_map, tree_map_path

__all__ = [
    "Traced",
    "adamw",
    "check_complex_step",
    "check_vjp",
    "clip_by_global_norm",
    "clip_factor",
    "complex_step_gradient",
    "decay_mask",
    "global_norm",
    "primitive",
    "pullback",
    "sgd",
    "tree_items",
    "tree_map",
    "tree_map_path",
    "value_and_grad",
    "value_of",
    "warmup_cosine",
]
