"""The words of CUDA kernels: what each compiles to, and that it computes what its Python definition says.

What they compile to is read in the PTX, with no device. Values are compared twice, in the kernel interpreter and on a
device (marked gpu). The float32 formulas are also evaluated here as the device does it, in NumPy: with the device's own
polynomials, and with its instructions as wrong as they may be.
"""

from __future__ import annotations

import re
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_scalar import SILU_DERIVATIVE_IS_ZERO, exact, points

from npmamba import scalar
from npmamba.cuda import device, launch, primitives, requirements, vectors
from npmamba.cuda.device import (
    Data,
    Long,
    Size,
    Stride,
    Wide,
    commit_async,
    copy_async,
    cuda,
    double,
    fetch2,
    fetch4,
    follow,
    load,
    load2,
    load4,
    load8,
    rcp,
    shift,
    store,
    store2,
    store4,
    store8,
    unpacked,
    wait_async,
)  # fmt: skip
from npmamba.cuda.launch import FLOATS, Kernel
from npmamba.cuda.vectors import either
from npmamba.scalar import (
    cast,
    decay_factor,
    decay_of,
    decayed,
    divide,
    exp,
    exp2,
    exp2m1,
    expm1,
    fma,
    is_double,
    log1p,
    magnitude,
    phi,
    phi_derivative,
    select,
    sigmoid,
    silu,
    silu_derivative,
    softplus,
    sqrt,
    state_step,
)  # fmt: skip

uint32, int64 = np.uint32, np.int64
THREADS = 32
ALL = pytest.mark.parametrize("dtype", FLOATS)
COMPUTED = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(autouse=True)
def kernels_of_this_file_stay_here(monkeypatch):
    monkeypatch.setattr(launch, "KERNELS", [])


# --- what words compile to ---


def _vectors(real, count):
    get = {1: lambda p, i: (load(p, i),), 2: load2, 4: load4, 8: load8}[count]
    put = {1: lambda p, i, v: store(p, i, v[0]), 2: store2, 4: store4, 8: store8}[count]

    def vectors(x: Data, y: Data, n: Size):
        """y = x, `count` numbers at a time."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            put(y, i * uint32(count), get(x, i * uint32(count)))

    return vectors


def _copies(real, data):
    per = 16 // data.itemsize
    size = 2 * THREADS * per

    def copies(x: Data, y: Data, n: Size):
        """y[2 i] = x[i] and y[2 i + 1] = 0, by two groups of asynchronous copies; those of the second are not valid."""
        shared = cuda.shared.array(size, data, 16)
        t = uint32(cuda.threadIdx.x)
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + t
        copy_async(shared, t * uint32(per), x, i * uint32(per), i < n)
        commit_async()
        copy_async(shared, (t + uint32(THREADS)) * uint32(per), x, i * uint32(per), n == uint32(0))
        commit_async()
        wait_async(1)
        cuda.syncthreads()
        if i < n:
            for k in range(per):
                store(y, (i * uint32(2)) * uint32(per) + uint32(k), load(shared, t * uint32(per) + uint32(k)))
        wait_async(0)
        cuda.syncthreads()
        if i < n:
            for k in range(per):
                place = (t + uint32(THREADS)) * uint32(per) + uint32(k)
                store(y, (i * uint32(2) + uint32(1)) * uint32(per) + uint32(k), load(shared, place))

    return copies


def _fetches(real, data, count):
    per = 4 * count // data.itemsize
    get = {2: fetch2, 4: fetch4}[count]
    put = {1: lambda p, i, v: store(p, i, v[0]), 2: store2, 4: store4, 8: store8}[per]

    def fetches(x: Data, y: Data, n: Size):
        """y = x by words, and zeros for the second half, where nothing is read."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        words = get(x, i * uint32(per), i < n // uint32(2))
        if i < n:
            put(y, i * uint32(per), unpacked(x, words))

    return fetches


WORDS = "exp2 sqrt rcp divide magnitude fma select cast double".split()


def _numbers(real):
    def numbers(x: Wide, y: Wide, z: Wide, out: Wide, n: Size):
        """out[k] = the k-th of `WORDS`, of x, y and z."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            a, b, c = load(x, i), load(y, i), load(z, i)
            store(out, i, exp2(a))
            store(out, i + n, sqrt(a))
            store(out, i + n * uint32(2), rcp(a))
            store(out, i + n * uint32(3), divide(a, b))
            store(out, i + n * uint32(4), magnitude(a))
            store(out, i + n * uint32(5), fma(a, b, c))
            store(out, i + n * uint32(6), select(a < b, a, c))
            store(out, i + n * uint32(7), a + cast(0.1, a))
            store(out, i + n * uint32(8), double(a))

    return numbers


FORMULAS = "exp expm1 log1p sigmoid softplus silu silu_derivative phi phi_derivative".split()


def _formulas(real):
    def formulas(x: Wide, out: Wide, n: Size):
        """out[k] = the k-th of `FORMULAS`, of x."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            a = load(x, i)
            store(out, i, exp(a))
            store(out, i + n, expm1(a))
            store(out, i + n * uint32(2), log1p(a))
            store(out, i + n * uint32(3), sigmoid(a))
            store(out, i + n * uint32(4), softplus(a))
            store(out, i + n * uint32(5), silu(a))
            store(out, i + n * uint32(6), silu_derivative(a))
            store(out, i + n * uint32(7), phi(a))
            store(out, i + n * uint32(8), phi_derivative(a))

    return formulas


def _slow_steps(real):
    def slow_steps(x: Wide, h: Wide, out: Wide, n: Size):
        """What a step of exponent x does to a state h, and to a gradient"""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            a, state = load(x, i), load(h, i)
            factor = decay_factor(exp2(a), a)
            store(out, i, state_step(factor, a, state, cast(0, a)))
            store(out, i + n, decayed(factor, a, state))
            store(out, i + n * uint32(2), decay_of(factor, a))
            store(out, i + n * uint32(3), exp2m1(a) if is_double(a) else decay_of(factor, a) - cast(1, a))

    return slow_steps


def _moves(real):
    def moves(addresses: Long, x: Data, y: Data, far: Stride, n: Size):
        """y[i] = x[i + far], by the address of x alone, and back by `far`."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            there = follow(x, load(addresses, uint32(0)), n + n)
            store(y, i, load(shift(shift(there, far + far), -far), i))

    return moves


@pytest.fixture(scope="module")
def ptx():
    """The PTX of a kernel of this file, each compiled once."""
    try:
        requirements.require_compiler()
    except requirements.CudaUnavailableError as error:
        pytest.skip(str(error))
    from npmamba.cuda.compile import compile_machine

    kept: dict[Any, str] = {}

    def text(build: Any, dtype: Any, **constants: Any) -> str:
        key = (build, dtype, *constants.values())
        if key not in kept:
            kept[key] = compile_machine(*Kernel(build, THREADS).specialize(dtype, **constants), cc=(9, 0)).ptx
        return kept[key]

    return text


def accesses(ptx: str, instruction: str) -> list[int]:
    """Return the bytes of each access."""
    found = re.findall(rf"\b{instruction}(?:\.nc)?(?:\.v(\d))?\.\w(\d+)", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


@ALL
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_neighbours_travel_in_accesses_of_16_bytes(ptx, dtype, count):
    size = count * np.dtype(dtype).itemsize
    wanted = [min(size, 16)] * -(-size // 16)
    assert accesses(ptx(_vectors, dtype, count=count), "ld.global") == wanted
    assert accesses(ptx(_vectors, dtype, count=count), "st.global") == wanted


@pytest.mark.parametrize(
    ("dtype", "count", "instructions"),
    [
        ("float16", 1, ["cvt.ftz.f32.f16", "cvt.rn.f16.f32"]),
        ("float16", 8, ["cvt.ftz.f32.f16", "cvt.rn.f16x2.f32"]),
        ("bfloat16", 1, ["shl.b32", "cvt.rn.bf16.f32"]),
        ("bfloat16", 8, ["shl.b32", "and.b32", "cvt.rn.bf16x2.f32"]),
    ],
)
def test_half_types_are_converted_by_one_instruction(ptx, dtype, count, instructions):
    text = ptx(_vectors, dtype, count=count)
    for instruction in instructions:
        assert instruction in text
    assert len(re.findall(r"cvt\.rn\.", text)) == max(1, count // 2), "two numbers by each"


@ALL
def test_copies_are_asynchronous(ptx, dtype):
    text = ptx(_copies, dtype)
    assert len(re.findall(r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;", text)) == 2
    asynchronous = [r"cp\.async\.cg", r"cp\.async\.commit_group;"] * 2
    waits = [r"cp\.async\.wait_group 1;", r"bar\.sync", r"cp\.async\.wait_group 0;", r"bar\.sync"]
    assert re.search(".*".join([*asynchronous, *waits]), text, re.DOTALL), "in this order"


@ALL
@pytest.mark.parametrize("count", [2, 4])
def test_words_are_fetched_by_one_access_or_not_at_all(ptx, dtype, count):
    text = ptx(_fetches, dtype, count=count)
    assert len(re.findall(rf"@here ld\.global\.v{count}\.b32", text)) == 1
    assert accesses(text, "ld.global") == [4 * count]
    assert accesses(text, "st.global") == [4 * count]


@ALL
def test_an_address_is_followed_to_global_memory(ptx, dtype):
    text, size = ptx(_moves, dtype), np.dtype(dtype).itemsize
    assert accesses(text, "ld.global") == [8, size], "the address, and what lies there"
    assert accesses(text, "st.global") == [size]
    assert not re.search(r"\b(ld|st)\.[^gp]", text), "global memory and parameters only"


def _any_number_pending(real):
    def any_number_pending(n: Size):
        wait_async(n)

    return any_number_pending


def test_how_many_copies_may_be_pending_is_a_constant(ptx):
    with pytest.raises(Exception, match="wait_async"):
        ptx(_any_number_pending, "float32")


def _chosen_by_number(real):
    def chosen_by_number(n: Size, y: Wide):
        store(y, n, select(n, load(y, 0), load(y, 1)))

    return chosen_by_number


def test_select_wants_a_bool(ptx):
    """Of a number LLVM would take the lowest bit."""
    with pytest.raises(Exception, match="select: chooses by a bool, not by uint32"):
        ptx(_chosen_by_number, "float32")


def test_a_log_that_says_nothing_of_a_kernel_is_an_error(ptx):
    from npmamba.cuda.compile import Machine

    log = "0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
    log += "used 31 registers, used 0 barriers, 16 stack, 1024 bytes smem, 24 bytes lmem"
    assert Machine("axpy", b"", log, "").resources == (31, 1024, 12, 24)
    for part in ("", *log.splitlines()):
        with pytest.raises(ValueError, match="^the linker's log says nothing of axpy: "):
            _ = Machine("axpy", b"", part, "").resources


INSTRUCTIONS = {
    "float32": [
        "ex2.approx.ftz.f32", "sqrt.rn.f32", "rcp.approx.ftz.f32", "abs.ftz.f32", "fma.rn.ftz.f32", "selp.f32",
        "cvt.f64.f32",
    ],
    "float64": ["sqrt.rn.f64", "div.rn.f64", "abs.f64", "fma.rn.f64", "selp.f64"],
}  # fmt: skip


@COMPUTED
def test_numbers_take_the_instructions_meant_for_them(ptx, dtype):
    text = ptx(_numbers, dtype)
    for instruction in INSTRUCTIONS[dtype]:
        assert instruction in text
    assert "div." not in text or dtype == "float64"
    assert accesses(text, "st.global") == [np.dtype(dtype).itemsize] * len(WORDS)


def test_the_formulas_divide_by_reciprocals_and_call_nothing(ptx):
    text = ptx(_formulas, "float32")
    for slow in ("div.rn", "call", ".f64", ".local"):
        assert slow not in text
    assert text.count("ex2.approx.ftz.f32") <= 8, "one each, but for log1p"


# --- what words compute, in the interpreter and on a device ---


def run(backend: Any, build: Any, dtype: Any, blocks: int, *arguments: Any, **constants: Any) -> list[np.ndarray]:
    """Launch a kernel, and return its arrays."""
    with backend.running():
        given = [backend.array(x) for x in arguments]
        Kernel(build, THREADS).launch((blocks,), np.dtype(dtype), tuple(given), **constants)
        return [backend.numpy(x) for x in given if not isinstance(x, int)]


def wide(x: np.ndarray) -> np.ndarray:
    """Return numbers as float64; NaN of whatever bits is not worth a warning."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def patterns(dtype: Any, count: int) -> np.ndarray:
    """Return numbers of every kind: zeros, denormals, the largest, infinities, NaN, and random bits."""
    dtype = np.dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    edges = [0.0, -0.0, 1, -1, info.tiny, info.max, info.min, np.inf, -np.inf, np.nan, info.smallest_subnormal]
    bits = np.random.default_rng(0).integers(0, 256, count * dtype.itemsize, np.uint8)
    return np.concatenate([np.array(edges).astype(dtype), bits.view(dtype)])[:count]


@ALL
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_what_is_loaded_and_stored_is_the_same(device_backend, dtype, count):
    n = 8192 if device_backend.fast else 2 * THREADS
    x = patterns(dtype, n * count)
    _, y = run(device_backend, _vectors, dtype, n // THREADS, x, np.zeros_like(x), n - 3, count=count)
    stop = (n - 3) * count
    before, after = wide(x[:stop]), wide(y[:stop])
    np.testing.assert_array_equal(after, before)
    assert (np.signbit(after) == np.signbit(before))[np.isfinite(before)].all()
    assert (wide(y[stop:]) == 0).all()


def _narrowing(real, data):
    def narrowing(x: Wide, one: Data, two: Data, n: Size):
        """one = x and two = x, rounded by one and by two at a time."""
        i = uint32(cuda.blockIdx.x) * uint32(THREADS) + uint32(cuda.threadIdx.x)
        if i < n:
            low, high = load(x, i + i), load(x, i + i + uint32(1))
            store(one, i + i, low)
            store(one, i + i + uint32(1), high)
            store2(two, i + i, (low, high))

    return narrowing


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_rounded_to_nearest_even(device_backend, dtype):
    n = 4096 if device_backend.fast else 2 * THREADS
    info, rng = ml_dtypes.finfo(np.dtype(dtype)), np.random.default_rng(1)
    ties = 1 + np.arange(64) * float(info.eps) / 4
    edges = np.array([float(info.max) * k for k in (1, 1.0005, 1.01, -2)] + [float(info.tiny) * k for k in (0.3, 0.7)])
    x = np.concatenate([ties, edges, rng.standard_normal(2 * n) * 10.0 ** rng.integers(-9, 5, 2 * n)])[: 2 * n]
    empty = np.zeros(2 * n, dtype)
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
        wanted = x.astype(dtype).astype(np.float32)
    _, one, two = run(device_backend, _narrowing, dtype, n // THREADS, x, empty, empty.copy(), n)
    np.testing.assert_array_equal(one.astype(np.float32), wanted)
    np.testing.assert_array_equal(two.astype(np.float32), wanted)


@ALL
def test_copies_arrive_or_are_zeros(device_backend, dtype):
    per, n = 16 // np.dtype(dtype).itemsize, 2 * THREADS - 5
    x = patterns(dtype, n * per)
    _, y = run(device_backend, _copies, dtype, 2, x, np.ones(2 * n * per, dtype), n)
    y = y.reshape(n, 2, per)
    np.testing.assert_array_equal(wide(y[:, 0]), wide(x.reshape(n, per)))
    assert (wide(y[:, 1]) == 0).all()


@ALL
@pytest.mark.parametrize("count", [2, 4])
def test_words_hold_their_numbers_or_zeros(device_backend, dtype, count):
    per, n = 4 * count // np.dtype(dtype).itemsize, 2 * THREADS - 6
    x = patterns(dtype, n * per)
    x, y = run(device_backend, _fetches, dtype, 2, x, np.ones(n * per, dtype), n, count=count)
    half = n // 2 * per
    np.testing.assert_array_equal(wide(y[:half]), wide(x[:half]))
    assert (wide(y[half:]) == 0).all()


def _rows(real, data, width):
    count = 8 * width
    read, write = either(vectors.readers(width, count)), either(vectors.writers(width, count))

    def rows(x: Wide, y: Wide, n: Size, wide: Size):
        """y = x, by vectors of `width` or by numbers."""
        held, t = cuda.local.array(count, real), uint32(cuda.threadIdx.x)
        first, step = uint32(t * uint32(width)), uint32(THREADS * width)
        read(held, x, first, step, n, wide)
        write(held, y, first, step, n, wide)

    return rows


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("wide", [0, 1])
def test_a_row_is_moved_by_vectors_as_by_numbers(device_backend, width, wide):
    """A row that ends in the middle of a thread's vectors; nothing behind it is written."""
    n = 6 * THREADS * width - 4 * width
    x = np.arange(n, dtype=np.float32) + 1
    _, y = run(device_backend, _rows, "float32", 1, x, np.zeros(n + 8, np.float32), n, wide, width=width)
    np.testing.assert_array_equal(y, np.pad(x, (0, 8)))


@ALL
def test_pointers_move_both_ways_and_follow_addresses(device_backend, dtype):
    n = THREADS
    with device_backend.running():
        x = device_backend.array(np.arange(2 * n).astype(dtype))
        address = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
        addresses, y = device_backend.array(np.array([address])), device_backend.array(np.zeros(n, dtype))
        Kernel(_moves, THREADS).launch((1,), x.dtype, (addresses, x, y, 7, n))
        y = device_backend.numpy(y)
    np.testing.assert_array_equal(y.astype(np.float64), np.arange(n) + 7)


@COMPUTED
def test_words_compute_their_definitions(device_backend, dtype):
    n, rng, eps = 4 * THREADS, np.random.default_rng(0), np.finfo(dtype).eps
    x, y, z = (rng.uniform(0.01, 30, n).astype(dtype) for _ in range(3))
    *_, out = run(device_backend, _numbers, dtype, 4, x, y, z, np.zeros((9, n), dtype), n)
    found = dict(zip(WORDS, out.astype(np.float64), strict=True))
    a, b, c = (v.astype(np.float64) for v in (x, y, z))
    wanted = {
        "exp2": 2**a, "sqrt": np.sqrt(a), "rcp": 1 / a, "divide": a / b, "magnitude": a,
        "fma": a.astype(np.longdouble) * b + c, "select": np.where(a < b, a, c),
        "cast": a + float(np.dtype(dtype).type(0.1)), "double": a,
    }  # fmt: skip
    units = {"exp2": 2.0, "sqrt": 0.51, "rcp": 1.0, "divide": 2.0, "fma": 1.01, "cast": 0.51}
    for word in WORDS:
        error = np.abs(found[word] - wanted[word]) / (eps * np.abs(wanted[word]))
        assert error.max() <= units.get(word, 0), word


EDGES = {
    -np.inf: 0, -1e30: 0, -150: 0, -126: 2.0**-126, -0.0: 1, 1: 2, 127: 2.0**127, 128: np.inf, 129: np.inf,
    1e30: np.inf, np.inf: np.inf,
}  # fmt: skip


def test_exp2_keeps_its_contract_at_the_edges(device_backend):
    """NaN gives NaN, from 128 on infinity, below -126 zero or the right value."""
    x = np.array([*EDGES, *[np.nan] * (THREADS - len(EDGES))], np.float32)
    ones = np.ones(THREADS, np.float32)
    *_, out = run(device_backend, _numbers, "float32", 1, x, ones, ones, np.zeros((9, THREADS), np.float32), THREADS)
    np.testing.assert_array_equal(out[0, : len(EDGES)], list(EDGES.values()))
    assert np.isnan(out[0, len(EDGES) :]).all()
    assert np.isnan(out[[2, 4, 5, 7, 8], -1]).all(), "NaN passes through all others"


UNITS = {
    "float32": {
        "exp": 4, "expm1": 2, "log1p": 3, "sigmoid": 6, "softplus": 5, "silu": 7, "silu_derivative": 12, "phi": 6,
        "phi_derivative": 12,
    },
    "float64": {
        "exp": 2, "expm1": 2, "log1p": 2, "sigmoid": 3, "softplus": 3, "silu": 4, "silu_derivative": 6, "phi": 3,
        "phi_derivative": 6,
    },
}  # fmt: skip
"""Errors allowed, in units of eps times the value: the two of ex2.approx and the one of rcp.approx, and roundings."""


def check_formula(name: str, dtype: Any, x: np.ndarray, found: np.ndarray) -> float:
    """Compare with mpmath; return the largest error in units."""
    kind = np.dtype(dtype)
    wanted, inside = exact(name, x), np.finfo(kind)
    size = np.maximum(np.abs(wanted), inside.tiny)
    error = np.abs(found - wanted) / size / inside.eps
    if name == "silu_derivative":
        error = error / (1 + np.maximum(x, 0) / 8)  # 1 - sigmoid(x) is exact to some units of 1, not of itself
    assert error.max() <= UNITS[kind.name][name], (name, x[error.argmax()], error.max())
    return float(error.max())


@COMPUTED
def test_formulas_are_right_to_a_few_units(device_backend, dtype):
    """In the interpreter these are NumPy's primitives, on a device its own."""
    kind = np.dtype(dtype).type
    every = {name: points(name, kind)[:: 1 if device_backend.fast else 9] for name in FORMULAS}
    x = np.unique(np.concatenate(list(every.values())))
    n = len(x)
    with np.errstate(all="ignore"):
        _, out = run(device_backend, _formulas, dtype, -(-n // THREADS), x, np.zeros((len(FORMULAS), n), dtype), n)
    for row, name in zip(out, FORMULAS, strict=True):
        chosen = np.isin(x, every[name])
        check_formula(name, dtype, x[chosen], row[chosen].astype(np.float64))


@COMPUTED
def test_a_slow_decay_is_held_less_one_in_float64(device_backend, dtype):
    """So it is right to some units of 1 - 2^x there, and of 1 in float32; infinite states stay so."""
    x = -np.logspace(-18, np.log10(0.5), THREADS - 2).astype(dtype)
    x, h = np.concatenate([x, x[:2]]), np.ones(THREADS, dtype)
    h[-2:] = np.inf, -np.inf
    *_, out = run(device_backend, _slow_steps, dtype, 1, x, h, np.zeros((4, THREADS), dtype), THREADS)
    loss, eps = np.expm1(x.astype(np.float64) * np.log(2)), np.finfo(dtype).eps
    np.testing.assert_array_equal(out[:2, -2:], [h[-2:]] * 2)
    np.testing.assert_allclose(out[:3, :-2], [1 + loss[:-2]] * 3, rtol=0, atol=3 * eps)
    size = np.abs(loss) if dtype == "float64" else 1
    assert (np.abs(out[3] - loss) / size).max() <= 3 * eps


def test_nan_gives_nan_in_every_formula(device_backend):
    x = np.full(THREADS, np.nan, np.float32)
    _, out = run(device_backend, _formulas, "float32", 1, x, np.zeros((len(FORMULAS), THREADS), np.float32), THREADS)
    assert np.isnan(out).all()


# --- the float32 formulas as a device evaluates them, in NumPy ---


def emulated(function: Any, table: dict[Any, Any]) -> Any:
    """Return a copy of a formula in which primitives are replaced as `npmamba.cuda.translate` replaces them."""
    found = table.get(function, function)
    ours = isinstance(found, types.FunctionType) and found.__module__ in (scalar.__name__, primitives.__name__)
    if not ours or found in (scalar.cast, scalar.fma, scalar.select):
        return found
    scope = {
        name: emulated(value, table) if callable(value) else value
        for name, value in found.__globals__.items()
        if name in found.__code__.co_names
    }
    return types.FunctionType(found.__code__, scope, found.__name__)


def instruments(rng: np.random.Generator | None) -> dict[Any, Any]:
    """Return the primitives of a device, its instructions exact, or wrong by all that NVIDIA allows, at random."""

    def instruction(compute: Any, units: int) -> Any:
        def approximate(x: Any) -> Any:
            value = compute(x.astype(np.float64))
            if rng is not None:
                value = value * (1 + rng.uniform(-units, units, np.shape(x)) * 2.0**-23)
            value = value.astype(np.float32)
            return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.float32(0), value)

        return approximate

    return {
        scalar.exp: primitives.exp_float32,
        scalar.log1p: scalar.log1p_polynomial,
        scalar.divide: primitives.divide_float32,
        scalar.exp2: instruction(np.exp2, 2),
        scalar.expm1: instruction(np.expm1, 1),
        device.rcp: instruction(lambda x: 1 / x, 1),
    }


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("wrong", [False, True], ids=["exact", "wrong"])
def test_the_devices_float32_formulas_are_right_to_a_few_units(name, wrong):
    x = points(name, np.float32)
    for seed in range(5 if wrong else 1):
        formula = emulated(getattr(scalar, name), instruments(np.random.default_rng(seed) if wrong else None))
        with np.errstate(all="ignore"):
            found = formula(x)
        assert found.dtype == np.float32
        units = check_formula(name, np.float32, x, found.astype(np.float64))
        assert wrong or units <= UNITS["float32"][name] / 2, "the instructions' own errors need room"


def test_the_emulation_uses_the_devices_primitives():
    calls = []
    table = {scalar.exp: lambda x: calls.append("exp") or np.exp(x), scalar.log1p: lambda x: calls.append("log1p") or x}
    emulated(softplus, table)(np.float32([1, 2]))
    assert calls == ["exp", "log1p"]


@pytest.mark.parametrize("x", [-np.inf, np.inf, np.nan, -1000, 1000, 88.7, -87.3])
def test_the_devices_exp_in_float32_at_the_edges(x):
    formula = emulated(exp, instruments(None))
    with np.errstate(all="ignore"):
        found, wanted = formula(np.float32([x]))[0], np.exp(np.float32(x))
    np.testing.assert_allclose(found, 0 if 0 < wanted < np.finfo(np.float32).tiny else wanted, rtol=3e-7)


def test_every_word_is_tested():
    """`npmamba.cuda.device` and `npmamba.scalar` name no word that this file leaves out."""
    public = {name for name, value in vars(device).items() if isinstance(value, types.FunctionType) and name[0] != "_"}
    words = public - {"arguments_of", "wide_dtype"}
    known = set(globals())
    assert words <= known, words - known
    elementary = {one.__name__ for one in scalar.PRIMITIVES} - {"exp2_product", "exp2_product_small"}
    assert elementary <= known, elementary - known
    assert SILU_DERIVATIVE_IS_ZERO < 0
