"""The vector type: compiled code against the same function run on short NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import config, njit
from numba.core.errors import TypingError

from npmamba.cpu import simd
from npmamba.cpu.runtime import Int, Kernel, Read, ReadInt, Write, kernel
from npmamba.cpu.simd import LANES, accumulate, anchored, any_lane, load, pick, prefetch, store, total, width
from npmamba.scalar import cast, exp2_product, fma, is_double, log1p, select, sqrt

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
NUMBERS = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-30, np.inf, -np.inf, np.nan, 7.25]


@kernel
def _operate(start: Int, stop: Int, x: Read[1], y: Read[1], out: Write[2], sums: Write[1]):
    """Every operation on one pair of vectors; comparisons and masks show through `select`."""
    p, q, one, zero = load(x, (0,)), load(y, (0,)), cast(1, load(x, (0,))), cast(0, load(x, (0,)))
    store(out, (0, 0), p + q)
    store(out, (1, 0), p - q)
    store(out, (2, 0), p * q)
    store(out, (3, 0), p / q)
    store(out, (4, 0), -p)
    store(out, (5, 0), select(p < q, one, zero))
    store(out, (6, 0), select(p <= q, one, zero))
    store(out, (7, 0), select(p > q, one, zero))
    store(out, (8, 0), select(p >= q, one, zero))
    store(out, (9, 0), select(p == q, one, zero))
    store(out, (10, 0), select(p != q, one, zero))
    store(out, (11, 0), select((p < q) & (q < one), p, q))
    store(out, (12, 0), select((p < q) | (p == one), p, q))
    store(out, (13, 0), cast(0.1, p))
    store(out, (14, 0), cast(y[0], p))
    store(out, (15, 0), sqrt(p * p))
    sums[0] = total(p)
    sums[1] = width(x)


@kernel
def _copy(start: Int, stop: Int, x: Read[3], place: ReadInt[1], count: Int, out: Write[3]):
    """Read a vector with a count and store it with a count; also whole vectors, from element 0."""
    b, i, j = place[0], place[1], place[2]
    prefetch(x, (b, i, j))
    prefetch(x, (b + 1000, i, j - 1000))
    store(out, (b, i, j), load(x, (b, i, j), count))
    store(out, (0, 0, 0), cast(5, load(x, (b, i, j), count)), count)


@kernel
def _fma(start: Int, stop: Int, x: Read[1], y: Read[1], z: Read[1], out: Write[2]):
    store(out, (0, 0), fma(load(x, (0,)), load(y, (0,)), load(z, (0,))))
    for i in range(width(x)):
        out[1, i] = fma(x[i], y[i], z[i])


def both_ways(declared: Kernel, dtype: Any, *arguments: Any) -> tuple[list[Any], list[Any]]:
    """Run a kernel compiled and as plain Python, on copies, and return both sets of arguments."""
    copies: list[Any] = [[a.copy(order="K") if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2)]
    declared[dtype](0, 1, *copies[0])
    with np.errstate(all="ignore"):
        declared.function(0, 1, *copies[1])
    return copies[0], copies[1]


@DTYPES
@pytest.mark.parametrize("seed", range(8))
def test_operations_on_vectors_are_those_of_numpy(dtype, seed):
    """NaN, infinities and signed zeros among them."""
    rng, lanes = np.random.default_rng(seed), LANES[np.dtype(dtype)]
    x, y = (np.where(rng.random(lanes) < 0.5, rng.choice(NUMBERS, lanes), rng.standard_normal(lanes)) for _ in "xy")
    out, sums = np.full((16, lanes), 9, dtype), np.full(2, 9, dtype)
    compiled, plain = both_ways(_operate, dtype, x.astype(dtype), y.astype(dtype), out, sums)
    for row in range(16):
        np.testing.assert_array_equal(compiled[2][row], plain[2][row], err_msg=f"operation {row}")
        kept = ~np.isnan(plain[2][row])
        np.testing.assert_array_equal(np.signbit(compiled[2][row])[kept], np.signbit(plain[2][row])[kept])
    np.testing.assert_array_equal(compiled[3], plain[3])
    assert compiled[3][1] == lanes


@DTYPES
def test_the_total_has_one_order_whatever_the_numbers(dtype):
    """Halves are folded: the order of NumPy's sum would round otherwise."""
    rng, lanes = np.random.default_rng(0), LANES[np.dtype(dtype)]
    out, sums, zeros = np.zeros((16, lanes), dtype), np.zeros(2, dtype), np.zeros(lanes, dtype)
    for _ in range(50):
        x = (rng.standard_normal(lanes) * 10.0 ** rng.integers(-3, 4, lanes)).astype(dtype)
        compiled, plain = both_ways(_operate, dtype, x, zeros, out, sums)
        folded = x
        while folded.size > 1:
            folded = folded[: folded.size // 2] + folded[folded.size // 2 :]
        assert compiled[3][0] == plain[3][0] == folded[0]


@DTYPES
@settings(max_examples=60)
@given(data=st.data())
def test_a_vector_is_read_and_written_up_to_its_count(dtype, data):
    """Any place, any count from below 0 to above the lanes, any strides of the other axes; nothing else is touched."""
    lanes = LANES[np.dtype(dtype)]
    place = [data.draw(st.integers(0, 2)) for _ in range(2)] + [data.draw(st.integers(0, 5))]
    count = data.draw(st.integers(-2, lanes + 3))
    flips = tuple(data.draw(st.sampled_from([np.s_[:], np.s_[::-1]])) for _ in range(2))
    x = np.random.default_rng(0).standard_normal((3, 3, lanes + 9)).astype(dtype)[flips]
    out = np.full((3, 3, lanes + 9), 9, dtype).transpose(1, 0, 2)
    compiled, plain = both_ways(_copy, dtype, x, np.array(place), count, out)
    expected = np.full_like(out, 9)
    b, i, j = place
    inside = max(0, min(count, lanes))
    expected[b, i, j : j + lanes] = 0
    expected[b, i, j : j + inside] = x[b, i, j : j + inside]
    expected[0, 0, :inside] = 5
    np.testing.assert_array_equal(compiled[3], expected)
    np.testing.assert_array_equal(plain[3], expected)


@DTYPES
def test_fma_rounds_once(dtype):
    lanes, eps = LANES[np.dtype(dtype)], np.finfo(dtype).eps
    x = np.full(lanes, 1 + eps, dtype)
    out = np.zeros((2, lanes), dtype)
    _fma[dtype](0, 1, x, x, np.full(lanes, -(1 + 2 * eps), dtype), out)
    np.testing.assert_array_equal(out, np.float64(eps) ** 2)


@DTYPES
def test_pick_reads_one_number_and_takes_its_index_as_it_is(dtype):
    numbers = np.arange(8, dtype=dtype)
    read = njit(lambda a, i: pick(a[4:], i))
    assert [read(numbers, i) for i in (0, 3)] == [4, 7]
    if not config.BOUNDSCHECK:
        assert read(numbers, -1) == 3
    assert pick(numbers, 5) == 5


@DTYPES
def test_an_anchored_view_shares_memory_with_its_array(dtype):
    lanes = LANES[np.dtype(dtype)]
    write = njit(lambda x, i: store(anchored(x, i), (1,), load(anchored(x, i), (0,))))
    for f in (write, write.py_func):
        x = np.arange(lanes + 9, dtype=dtype)
        f(x, 3)
        np.testing.assert_array_equal(x, [0, 1, 2, 3, *range(3, lanes + 3), *range(lanes + 4, lanes + 9)])
    read = njit(lambda x, i: (pick(anchored(x, i), 2), len(anchored(x, i))))
    assert read(x, 4) == (x[6], lanes + 5)
    outside = njit(lambda x, i: total(load(anchored(x, i), (1,))), boundscheck=True)
    assert outside(x, 8) == x[9:].sum()
    for place in (9, lanes + 20, -2):
        with pytest.raises(IndexError):
            outside(x, place)


@DTYPES
def test_places_outside_an_array_are_found_where_numba_is_told_to_check(dtype):
    """What ``NUMBA_BOUNDSCHECK=1`` says for all kernels. Lanes that are not touched may lie anywhere."""
    lanes = LANES[np.dtype(dtype)]
    x, sums = np.zeros((2, lanes + 5), dtype), np.zeros((2, lanes + 5))
    functions = [
        njit(lambda x, s, i, j, n: total(load(x, (i, j), n)), boundscheck=True),
        njit(lambda x, s, i, j, n: store(x, (i, j), load(x, (0, 0)), n), boundscheck=True),
    ]
    for f in functions:
        for place in [(0, 0, lanes), (1, 5, lanes), (1, 5, 99), (1, lanes + 4, 1), (0, 99, 0), (7, -9, -1)]:
            f(x, sums, *place)
        for place in [(0, 6, lanes), (0, 6, 99), (1, lanes + 5, 1), (0, -1, 2), (2, 0, 1), (-1, 0, 1)]:
            with pytest.raises(IndexError):
                f(x, sums, *place)
    whole = [
        njit(lambda x, s, i, j: total(load(x, (i, j))), boundscheck=True),
        njit(lambda x, s, i, j: store(x, (i, j), load(x, (0, 0))), boundscheck=True),
        njit(lambda x, s, i, j: accumulate(s, (i, j), load(x, (0, 0))), boundscheck=True),
        njit(lambda x, s, i, j: pick(s, (i, j + lanes - 1)), boundscheck=True),
        njit(lambda x, s, i, j: pick(s[i, :], j + lanes - 1), boundscheck=True),
    ]
    for g in whole:
        g(x, sums, 1, 5)
        for outside in [(1, 6), (1, -lanes)]:
            with pytest.raises(IndexError):
                g(x, sums, *outside)


@DTYPES
def test_any_lane_is_one_that_holds(dtype):
    @njit
    def negative(x):
        return any_lane(load(x, (0,)) < cast(0, load(x, (0,))))

    x = np.arange(LANES[np.dtype(dtype)]).astype(dtype)
    assert not negative(x)
    for i in range(x.size):
        assert negative(np.where(np.arange(x.size) == i, -1, x).astype(dtype))


@DTYPES
def test_a_vector_fills_a_register_of_the_processor(dtype):
    assert LANES[np.dtype(dtype)] * np.dtype(dtype).itemsize == simd.BYTES
    assert simd.BYTES in (32, 64)


def test_what_is_declared_read_cannot_be_written():
    def write(start: Int, stop: Int, x: Read[1]):
        store(x, (0,), load(x, (0,)))

    with pytest.raises(TypingError, match=r"store: cannot write Vector\(float32, .*\) to .*readonly"):
        Kernel(write)[np.float32]


def test_a_vector_of_another_dtype_is_not_stored():
    @njit
    def mix(x, y):
        store(x, (0,), load(y, (0,)))

    with pytest.raises(TypingError, match="store: cannot write Vector.float32"):
        mix(np.zeros(16), np.zeros(16, np.float32))


@pytest.mark.parametrize(
    ("word", "mistake"),
    [
        pytest.param("load", lambda x: total(load(x, (0, 0))), id="two indices for one axis"),
        pytest.param("add", lambda x: total(load(x, (0,)) + 1.0), id="a bare literal"),
        pytest.param("select", lambda x: total(select(True, load(x, (0,)), load(x, (0,)))), id="a bool for a mask"),
        pytest.param("pick", lambda x: pick(x.reshape(2, 8), 0), id="pick of a matrix"),
        pytest.param("anchored", lambda x: total(load(anchored(x[::2], 0), (0,))), id="an anchor in what has gaps"),
        pytest.param("store", lambda x: store(x, (0, 0), load(x, (0,))), id="a store by two indices for one axis"),
        pytest.param("log1p", lambda x: log1p(x), id="the logarithm of an array"),
        pytest.param("is_double", lambda x: is_double(x), id="the kind of an array"),
        pytest.param("exp2_product", lambda x: exp2_product(load(x, (0,)), x[0]), id="a vector times a number"),
    ],
)
def test_mistakes_do_not_compile(word, mistake):
    with pytest.raises(TypingError, match=rf"No implementation of function .*\b{word}\b.* found for signature"):
        njit(mistake)(np.zeros(16))
