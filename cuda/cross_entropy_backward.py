"""The backward kernel of the CUDA cross entropy: every logit is read once and its gradient written once."""

from __future__ import annotations

import numpy as np

from npmamba.cuda.cross_entropy_forward import THREADS, numbers_of
from npmamba.cuda.device import Data, Long, Size, Stride, Wide, cuda, load, shift
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import divided, row_pointer
from npmamba.cuda.vectors import place_of, readers, width_of, writers
from npmamba.scalar import select, softmax_term

uint32, int64 = np.uint32, np.int64
SPAN = 16_384
"""Logits of a row that a block of the backward pass writes at most."""


def _backward(real, data):
    numbers, width, number = numbers_of(real), width_of(data), real.type
    read_vectors, write_vectors = readers(width, numbers)[0], writers(width, numbers)[0]
    read_numbers, write_numbers = readers(1, numbers)[1], writers(1, numbers)[1]
    place, place_alone = place_of(width), place_of(1)
    chunk, step = THREADS * numbers, THREADS * width

    def subtract_label(x, k, j, label, top, factor, scale):
        """x_k = e^(l - top) factor, less `scale` at the label"""
        p = softmax_term(x[k], top, factor)
        x[k] = select(j == label, p - scale, p)

    def cross_entropy_backward(
        logits: Data, outer_stride: Stride, inner_stride: Stride, labels: Long, ignored: Stride,
        tops: Wide, sums: Wide, dout: Wide, count: Long, dlogits: Data, n: Size, inner: Size, wide: Size,
    ):  # fmt: skip
        """Equation: dl = (softmax(l) - onehot(label)) scale, with softmax(l) scale = e^(l - top) scale / sum and
        scale = dout / count.
        Threads: a block owns a row, or SPAN logits of it: blocks along y share a long row.
        Owns: its logits' gradients; zeros where the label is ignored.
        Saved: sum and largest logit of each row; how many rows count.
        """
        x = cuda.local.array(numbers, real)
        lane, row = uint32(cuda.threadIdx.x), uint32(cuda.blockIdx.x)
        label = load(labels, row)
        counted = label != ignored
        column = uint32(select(label >= 0 and label < int64(n), label, int64(n)))
        many = load(count, uint32(0))
        scale = load(dout, uint32(0)) / number(select(many > int64(0), many, int64(1)))
        top, factor = load(tops, row), scale / load(sums, row)
        p = row_pointer(logits, divided(row, inner), outer_stride, inner_stride)
        out = shift(dlogits, int64(row) * int64(n))
        for k in range(numbers):
            x[k] = number(0)
        at = uint32(uint32(cuda.blockIdx.y) * uint32(SPAN))
        end = select(uint32(n - at) < uint32(SPAN), n, uint32(at + uint32(SPAN)))
        while at < end:
            if wide:
                first = uint32(at + uint32(lane * uint32(width)))
                if counted:
                    read_vectors(x, p, first, uint32(step), n)
                    for k in range(numbers):
                        subtract_label(x, k, place(first, uint32(step), k), column, top, factor, scale)
                write_vectors(x, out, first, uint32(step), n)
            else:
                first = uint32(at + lane)
                if counted:
                    read_numbers(x, p, first, uint32(THREADS), n)
                    for k in range(numbers):
                        subtract_label(x, k, place_alone(first, uint32(THREADS), k), column, top, factor, scale)
                write_numbers(x, out, first, uint32(THREADS), n)
            at = uint32(at + uint32(chunk))

    return cross_entropy_backward


BACKWARD = Kernel(_backward, threads=THREADS, blocks=4, shipped={})
