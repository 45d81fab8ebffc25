"""CUDA twin of `npmamba.ops.embedding`: rows are copied as they are, gradients summed over tokens sorted by their ids.

Ids are not looked at by the host, which would have to wait for the device. One that is no row of the table gives a row
of NaN, and what its token receives goes nowhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npmamba.cuda.arrays import address, empty, library, zeros
from npmamba.cuda.device import Data, Flags, Long, Size, Stride, cuda, load, shift, store
from npmamba.cuda.embedding_backward import CHUNK, CHUNKS, FREQUENT, GROUP, ROWS, THREADS, WARPS
from npmamba.cuda.launch import Kernel
from npmamba.cuda.rows import inner_rows, lines, smaller, wide
from npmamba.cuda.token_order import token_order
from npmamba.cuda.vectors import readers, width_of, writers
from npmamba.shapes import compute_dtype

uint32, int64 = np.uint32, np.int64
WORDS = 16
"""Words of a row that a thread copies."""
MANY = 16_384
"""Blocks from which on a row of the table's gradient belongs to one warp, if its id is not frequent; else to four."""


# --- forward ---


def _forward(real, data):
    read_words, write_words, columns = readers(1, WORDS)[1], writers(1, WORDS)[1], 32 * WORDS
    read, write = (readers(4, WORDS)[0], writers(4, WORDS)[0]) if data == np.float32 else (read_words, write_words)

    def embedding_forward(
        weight: Data, stride: Stride, ids: Long, out: Data, raw: Flags,
        n: Size, tokens: Size, vocab: Size, size: Size, wide: Size,
    ):  # fmt: skip
        """Equation: out[t] = weight[ids[t]], bit by bit.
        Threads: a warp copies 512 words of a row, 16 bytes a thread at a time where memory allows.
        Owns: its words of out; all bits are set where the id is no row of the table, which is NaN in every type.
        Saved: nothing.
        """
        x = cuda.local.array(WORDS, data)
        tid = uint32(cuda.threadIdx.x)
        lane, token = tid & uint32(31), uint32(uint32(uint32(cuda.blockIdx.x) * uint32(WARPS)) + (tid >> uint32(5)))
        at = uint32(uint32(cuda.blockIdx.y) * uint32(columns))
        if token >= tokens:
            return
        key = load(ids, token)
        out = shift(out, int64(token) * int64(n))
        if key < int64(0) or key >= int64(vocab):
            raw = shift(raw, int64(token) * int64(n) * int64(size))
            i, end = uint32(at * size + lane), uint32((at + uint32(columns)) * size)
            while i < smaller(end, uint32(n * size)):
                store(raw, i, np.uint8(255))
                i = uint32(i + uint32(32))
            return
        row = shift(weight, key * stride)
        if wide:
            first = uint32(at + uint32(lane * uint32(4)))
            read(x, row, first, uint32(128), n)
            write(x, out, first, uint32(128), n)
        else:
            read_words(x, row, uint32(at + lane), uint32(32), n)
            write_words(x, out, uint32(at + lane), uint32(32), n)

    return embedding_forward


FORWARD = Kernel(_forward, threads=THREADS, shipped={}, dtypes=("float32", "uint8"))


# --- from the caller's arrays to the kernels' and back ---


class Saved(NamedTuple):
    """What the backward pass needs."""

    input_ids: Any
    vocab_size: int


def _flat(ids: Any) -> Any:
    return library(ids).ascontiguousarray(ids.astype(np.int64, copy=False)).reshape(-1)


def _word(x: Any) -> np.dtype:
    """Return the words that rows are copied by: of four bytes, or of one where rows are not whole words."""
    return np.dtype(np.uint8 if address(x) % 4 or x.strides[0] % 4 or x.shape[1] * x.itemsize % 4 else np.float32)


def _seen_as(x: Any, dtype: Any) -> Any:
    """Return `x` as numbers of `dtype`, which the interpreter wants to see; a device is told the address only."""
    return x.view(dtype) if library(x) is np else x


def forward(weight: Any, input_ids: Any, *, save: bool) -> tuple[Any, Saved | None]:
    """Return rows of `weight` and what `backward` needs (None unless `save`). All but the range of ids is checked."""
    vocab, d_model = weight.shape
    ids, out = _flat(input_ids), empty(weight, (*input_ids.shape, d_model), weight.dtype)
    if weight.strides[1] != weight.itemsize:
        weight = library(weight).ascontiguousarray(weight)
    word = _word(weight)
    stride, n = weight.strides[0] // word.itemsize, d_model * weight.itemsize // word.itemsize
    arrays = (_seen_as(weight, word), stride, ids, _seen_as(out.reshape(ids.size, d_model), word))
    arguments = (*arrays, _seen_as(out.reshape(ids.size, d_model), np.uint8), n, ids.size, vocab, word.itemsize)
    FORWARD.launch((-(-ids.size // WARPS), -(-n // (32 * WORDS))), word, (*arguments, int(wide(weight))))
    return out, Saved(input_ids, vocab) if save else None


def backward(dout: Any, saved: Saved) -> tuple[Any]:
    """Return the gradient of the table, in the dtype of `dout`."""
    vocab, d_model, ids = saved.vocab_size, dout.shape[-1], _flat(saved.input_ids)
    if ids.size == 0:
        return (zeros(dout, (vocab, d_model), dout.dtype),)
    keys, tokens = token_order(ids, vocab)
    begins, ends = zeros(dout, (2, vocab + 1), np.int64)
    parts = empty(dout, (ids.size // CHUNK, d_model), compute_dtype(dout.dtype))
    dweight = empty(dout, (vocab, d_model), dout.dtype)
    x = lines(dout)
    if inner_rows(x) != ids.size:
        x = lines(library(dout).ascontiguousarray(dout))
    rows = x.array, x.inner_stride if x.array.shape[1] > 1 else x.outer_stride
    aligned, pieces = int(wide(x.array)), -(-d_model // (32 * width_of(dout.dtype)))
    grid, arrays = (-(-ids.size // (CHUNK * WARPS)), pieces), (*rows, keys, tokens, begins, ends, parts)
    CHUNKS.launch(grid, dout.dtype, (*arrays, d_model, ids.size, aligned))
    every = vocab * pieces <= MANY
    if not every:
        of_rows = (*rows, tokens, begins, ends, dweight, d_model, vocab, aligned)
        ROWS.launch((-(-vocab // WARPS),), dout.dtype, of_rows)
    blocks = vocab if every else -(-ids.size // (CHUNK * GROUP))
    FREQUENT.launch((blocks, pieces), dout.dtype, (*arrays, dweight, d_model, ids.size, vocab, aligned, int(every)))
    return (dweight,)
