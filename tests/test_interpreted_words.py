"""Words of kernels that the interpreter stands in for, and what it says where they are misused: what kernels of this
package do not need, and those of others may."""

from __future__ import annotations

import math

import numpy as np
import pytest

from npmamba.cuda import device, primitives
from npmamba.cuda.device import Data, Long, copy_async, cuda, follow, load, load2, shift, store, store2
from npmamba.testing.findings import KernelError, OutOfRangeError, line_of
from npmamba.testing.interpret import interpret

# --- stand-ins ---


def test_every_word_on_a_grid_and_a_block_counts_as_cuda_does():
    def kernel(sizes, votes, bits):
        t = cuda.grid(1)
        sizes[0], (sizes[1], sizes[2]) = cuda.gridsize(1), cuda.gridsize(2)
        every, some = cuda.syncthreads_and(t % 2 < 2), cuda.syncthreads_or(t == 5)
        none, not_all = cuda.syncthreads_or(t < 0), cuda.syncthreads_and(t == 5)
        if t == 0:
            votes[0], votes[1], votes[2], votes[3] = every, some, none, not_all
            bits[0], bits[1], bits[2], bits[3] = cuda.ffs(40), cuda.ffs(0), cuda.clz(1), cuda.clz(0)

    sizes, votes, bits = np.zeros(3, np.int64), np.zeros(4, np.int64), np.zeros(4, np.int64)
    with pytest.raises(KernelError, match="sizes"):  # all threads write the same, which is a race still
        interpret(kernel, 1, (32, 2), sizes, votes, bits)
    interpret(kernel, 1, (32, 2), sizes, votes, bits, check=False)
    assert sizes.tolist() == [32, 32, 2]
    assert votes.tolist() == [1, 1, 0, 0]
    assert bits.tolist() == [4, 0, 31, 32]


def test_constants_of_math_are_pythons():
    def kernel(x):
        x[0], x[1], x[2] = math.pi, math.inf, math.floor(2.5)

    x = np.zeros(3)
    interpret(kernel, 1, 1, x)
    assert x.tolist() == [math.pi, math.inf, 2.0]


def test_words_without_a_stand_in_are_named():
    def atomic(x):
        cuda.atomic.nand(x, 0, 1)

    def word(x):
        cuda.nanosleep(5)

    with pytest.raises(KernelError, match=r"no stand-in for cuda\.atomic\.nand"):
        interpret(atomic, 1, 1, np.zeros(1, np.int64))
    with pytest.raises(KernelError, match=r"no stand-in for cuda\.nanosleep"):
        interpret(word, 1, 1, np.zeros(1, np.int64))


# --- misuse ---


def read(place):
    def kernel(x, y):
        y[0] = place(x)

    return kernel


@pytest.mark.parametrize("place", [lambda x: x[4], lambda x: x[-1]], ids=["after", "before"])
def test_a_place_outside_an_array_is_found(place):
    with pytest.raises(OutOfRangeError):
        interpret(read(place), 1, 1, np.zeros(4, np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("i", [4, -1])
def test_a_place_outside_an_array_is_found_when_it_is_written(i):
    def plain(x, y):
        x[i] = 1.0

    def pointer(x: Data, y):
        store(x, i, 1.0)

    def atomic(x, y):
        cuda.atomic.add(x, i, 1.0)

    def atomic_pointer(x: Data, y):
        cuda.atomic.add(x, i, 1.0)

    for kernel in (plain, pointer, atomic, atomic_pointer):
        with pytest.raises(OutOfRangeError):
            interpret(kernel, 1, 1, np.zeros(4, np.float32), np.zeros(1))


def test_an_address_between_two_numbers_is_found():
    def kernel(x: Data, addresses: Long):
        store(follow(x, load(addresses, 0), 2), 0, 1.0)

    y = np.zeros(3, np.float32)
    x = np.zeros(4, np.float32)
    interpret(kernel, 1, 1, x, np.array([y.ctypes.data]))
    assert y[0] == 1
    with pytest.raises(KernelError, match="is not aligned to its numbers of 4 bytes"):
        interpret(kernel, 1, 1, x, np.array([y.ctypes.data + 2]))


def test_all_threads_of_a_block_share_arrays_of_one_shape():
    def kernel(x):
        tile = cuda.shared.array(32 if cuda.threadIdx.x < 32 else 64, np.float32)
        tile[cuda.threadIdx.x % 32] = 1.0

    with pytest.raises(KernelError, match="another shape or dtype in another thread"):
        interpret(kernel, 1, 64, np.zeros(1))


def test_a_row_is_no_number():
    def kernel(x, y):
        x[0] = 1.0

    with pytest.raises(KernelError, match="not one"):
        interpret(kernel, 1, 1, np.zeros((2, 3), np.float32), np.zeros(1, np.float32))


@pytest.mark.parametrize("i", [(0, 3), (2, 0), (-1, 0)])
def test_a_place_outside_a_matrix_is_found(i):
    def kernel(x, y):
        y[0] = x[i]

    with pytest.raises(OutOfRangeError):
        interpret(kernel, 1, 1, np.zeros((2, 3), np.float32), np.zeros(1, np.float32))


def test_a_local_array_has_its_length_and_no_more():
    def length(y):
        y[0] = len(cuda.local.array(3, np.float32))

    def outside(y):
        local = cuda.local.array((2, 3), np.float32)
        local[1, 3] = 1.0

    y = np.zeros(1)
    interpret(length, 1, 1, y)
    assert y[0] == 3
    with pytest.raises(OutOfRangeError, match="outside its shape"):
        interpret(outside, 1, 1, y)


def test_a_vector_that_reaches_beyond_a_local_array_is_found():
    def reads(y: Data):
        local = cuda.local.array(3, np.float32)
        for k in range(3):
            local[k] = 1.0
        store2(y, 0, load2(local, 2))

    def writes(y: Data):
        store2(cuda.local.array(3, np.float32), 2, load2(y, 0))

    for kernel in (reads, writes):
        with pytest.raises(OutOfRangeError, match=r"local array .*\[3\] is outside its 3 elements"):
            interpret(kernel, 1, 1, np.zeros(4, np.float32))


def test_a_copy_that_reaches_beyond_shared_memory_is_found():
    def kernel(x: Data, n):
        copy_async(cuda.shared.array(6, np.float32, 16), n, x, 0, True)

    interpret(kernel, 1, 1, np.zeros(8, np.float32), 0)
    with pytest.raises(OutOfRangeError, match=r"shared array .*\[7\] is outside its 6 elements"):
        interpret(kernel, 1, 1, np.zeros(8, np.float32), 4)


def test_a_copy_changes_no_type():
    def kernel(x: Data):
        copy_async(cuda.shared.array(8, np.float64, 16), 0, x, 0, True)

    with pytest.raises(KernelError, match="copy_async from float32 to float64: thread 0 of block 0"):
        interpret(kernel, 1, 1, np.zeros(8, np.float32))


@pytest.mark.parametrize(("x", "offset"), [(np.zeros((2, 3, 4)), 23), (np.zeros((4, 3, 2)).T, 23)], ids=["C", "F"])
def test_an_element_of_several_axes_is_named_by_its_place(x, offset):
    def kernel(x: Data):
        store(x, offset, 1.0)

    with pytest.raises(KernelError, match=rf"x\[{offset}\], element \(1, 2, 3\), is written by thread"):
        interpret(kernel, 1, 2, x)
    with pytest.raises(KernelError, match=rf"x\[{offset}\] is written by thread"):
        interpret(kernel, 1, 2, x.reshape(-1, order="A"))


def test_an_array_can_be_moved_like_a_pointer():
    def kernel(x, y):
        store(shift(y, 2), 0, load(shift(x, 1), 1))

    y = np.zeros(3)
    interpret(kernel, 1, 1, np.arange(4.0), y)
    assert y.tolist() == [0, 0, 2]


@pytest.mark.parametrize("check", ["races", False])
def test_atomic_words_return_what_was_there(check):
    def kernel(x, old):
        old[cuda.grid(1)] = cuda.atomic.add(x, 1, 2)

    x, old = np.zeros(2, np.int64), np.full(64, -1)
    interpret(kernel, 2, 32, x, old, check=check)
    assert x.tolist() == [0, 128]
    assert sorted(old.tolist()) == list(range(0, 128, 2))


def test_a_pointer_that_is_none_can_be_neither_read_nor_written():
    def reads(x: Data, y: Data):
        store(y, 0, x[0])

    def writes(x: Data, y: Data):
        store(x, 0, 1.0)

    def assigns(x: Data, y: Data):
        x[0] = 1.0

    def moves(x: Data, y: Data):
        store(y, 0, load(shift(x, 3), 0))

    for kernel in (reads, writes, assigns, moves):
        with pytest.raises(OutOfRangeError, match="x is None"):
            interpret(kernel, 1, 1, None, np.zeros(1, np.float32))


def test_a_vector_is_stored_with_as_many_numbers_as_it_has():
    def kernel(x: Data, y: Data):
        store2(y, 0, (1.0, 2.0, 3.0))

    with pytest.raises(KernelError, match="store2 is given 3 numbers"):
        interpret(kernel, 1, 1, np.zeros(4, np.float32), np.zeros(4, np.float32))


def test_a_kernel_is_given_as_many_arguments_as_it_takes():
    with pytest.raises(TypeError, match="takes 1 arguments, got 2"):
        interpret(lambda x: None, 1, 1, np.zeros(1), np.zeros(1))


def test_an_error_of_the_kernels_own_says_which_thread_raised_it():
    def kernel(x):
        if cuda.threadIdx.x == 3:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as found:
        interpret(kernel, 1, 32, np.zeros(1))
    assert any("thread 3 of block 0" in note for note in found.value.__notes__)


def test_an_array_between_its_own_numbers_is_refused():
    x = np.zeros(9, np.uint8)[1:].view(np.float32)
    with pytest.raises(KernelError, match="x: its strides .* or its address"):
        interpret(lambda x: None, 1, 1, x)


def test_an_instruction_that_is_not_there_lies_in_the_first_line():
    code = test_constants_of_math_are_pythons.__code__
    assert line_of(code, 10**6) == code.co_firstlineno


# --- definitions: what the words of npmamba.cuda.device mean, on arrays ---


class Plain(np.ndarray):
    """An array that can be moved like a pointer."""

    def shifted(self, n):
        return self[n:]

    def followed(self, address, count):
        return ("followed", address, count)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_words_of_memory_are_defined_by_single_numbers(dtype):
    x = np.arange(32, dtype=dtype).view(Plain)
    wide = np.float64 if dtype == np.float64 else np.float32
    assert device.load(x, 3) == 3
    assert device.load(x, 3).dtype == wide
    for count, loads, stores in [
        (2, device.load2, device.store2), (4, device.load4, device.store4), (8, device.load8, device.store8),
    ]:  # fmt: skip
        assert [float(v) for v in loads(x, 8)] == list(range(8, 8 + count))
        y = np.zeros(16, dtype)
        stores(y, 4, loads(x, 8))
        assert y.tolist() == [0] * 4 + list(range(8, 8 + count)) + [0] * (12 - count)
    device.store(x, 1, 7)
    assert x[1] == device.load(device.shift(x, 1), 0) == 7
    assert device.follow(x, 64, 5) == ("followed", 64, 5)


@pytest.mark.parametrize(("valid", "expected"), [(True, [5, 6, 7, 8]), (False, [0, 0, 0, 0])])
def test_a_copy_is_16_bytes_or_zeros(valid, expected):
    shared = np.full(8, 9, np.float32)
    device.copy_async(shared, 4, np.arange(16, dtype=np.float32), 5, valid)
    device.commit_async()
    device.wait_async(0)
    assert shared.tolist() == [9, 9, 9, 9, *expected]


def test_numbers_that_only_devices_have_are_defined_too():
    assert device.double(np.float32(0.1)).dtype == np.float64
    assert device.rcp(np.float32(3)) == np.float32(1) / np.float32(3)
    assert device.rcp(np.float64(3)) == 1 / 3


NUMBERS = [0.25, 1.0, 3.5]
EXACT = {
    "exp": np.exp, "expm1": np.expm1, "exp2": np.exp2, "log1p": np.log1p, "sqrt": np.sqrt, "magnitude": np.abs,
    "rcp": lambda x: 1 / x, "divide": lambda x, y: x / y,
}  # fmt: skip
MANY = [name for name in vars(primitives) if name.endswith(("_float32", "_float64"))]


@pytest.mark.parametrize("name", MANY)
def test_a_primitive_of_more_than_one_instruction_is_its_function(name):
    """Those of CUDA devices run here as the interpreter has them."""
    function, (short, _, dtype) = getattr(primitives, name), name.rpartition("_")
    count = function.__code__.co_argcount
    if short not in EXACT:
        pytest.skip("tested with the scan")

    def one(x, y, out):
        for i in range(3):
            out[i] = function(x[i])

    def two(x, y, out):
        for i in range(3):
            out[i] = function(x[i], y[i])

    x, y, out = np.array(NUMBERS, dtype), np.array([3.0, 0.5, 7.0], dtype), np.zeros(3, dtype)
    interpret(one if count == 1 else two, 1, 1, x, y, out)
    exact = EXACT[short](*(v.astype(np.float64) for v in (x, y)[:count]))
    np.testing.assert_allclose(out, exact, rtol=8 * np.finfo(dtype).eps)


def test_what_is_known_when_a_kernel_is_compiled():
    assert primitives.is_double(1.0) is True
    assert primitives.is_not_double(1.0) is False
    assert primitives.exp2_product(np.float32(3), np.float32(0.5)) == np.exp2(np.float32(1.5))
