"""Matrix products divided among the kernels' threads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.cpu import matmul, runtime

sizes = st.integers(1, 70)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch):
    """Every product is divided, among two threads."""
    monkeypatch.setattr(matmul, "blas_is_serial", lambda: True)
    monkeypatch.setattr(matmul, "SERIAL_WORK", 0)
    runtime.set_num_threads(2)
    yield
    runtime.set_num_threads(None)


@pytest.mark.usefixtures("divided")
@given(sizes, sizes, sizes, st.integers(0, 99), st.booleans())
def test_a_divided_product_is_the_product(m, k, n, seed, turned):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    if turned:  # as the gradient of a weight has it
        x = np.asfortranarray(x)
    np.testing.assert_allclose(matmul.matmul(x, y), np.einsum("mk,kn->mn", x, y), rtol=0, atol=1e-12 * k)


@pytest.mark.usefixtures("divided")
def test_rows_of_a_wider_array_are_read_in_place():
    wide = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    y = np.ones((8, 5), np.float32)
    np.testing.assert_allclose(matmul.matmul(wide[:, 8:16], y), wide[:, 8:16] @ y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("environment", "serial"),
    [
        ({}, False),
        ({"OPENBLAS_NUM_THREADS": "1"}, True),
        ({"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "1"}, False),
        ({"OMP_NUM_THREADS": "1"}, True),
        ({"OPENBLAS_NUM_THREADS": "", "MKL_NUM_THREADS": "1"}, True),
    ],
)
def test_a_product_is_divided_only_where_blas_was_told_to_use_one_thread(monkeypatch, environment, serial):
    for name in ("OPENBLAS", "MKL", "OMP"):
        monkeypatch.delenv(f"{name}_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert matmul.blas_is_serial.__wrapped__() is serial


@pytest.mark.parametrize(("serial", "work", "threads"), [(False, 0, 2), (True, 1 << 22, 2), (True, 0, 1)])
def test_a_product_is_left_to_blas_where_dividing_gains_nothing(monkeypatch, serial, work, threads):
    monkeypatch.setattr(matmul, "blas_is_serial", lambda: serial)
    monkeypatch.setattr(matmul, "SERIAL_WORK", work)
    monkeypatch.setattr(runtime, "num_threads", lambda: threads)
    monkeypatch.delattr(runtime, "share")
    assert matmul.matmul(np.ones((2, 3)), np.ones((3, 4))).tolist() == [[3.0] * 4] * 2
