"""The model and its training on CuPy arrays, against the same on NumPy arrays.

The first part runs in the kernel interpreter too, where NumPy arrays are sent to the CUDA twins; the rest needs a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings

import ml_dtypes
import numpy as np
import pytest
from arrays import error
from models import random_params, random_tokens, tiny
from test_train import OPTIONS, StopAfter, assert_same_run, bits, config, text  # noqa: F401

from npmamba import backend, cli, lm, runs
from npmamba.autodiff import adamw, algebra, clip_factor, decay_mask, pullback, tree_items, value_and_grad
from npmamba.checkpoint import load_training
from npmamba.lm import MambaLM
from npmamba.progress import Silent
from npmamba.train import Interrupted, Loop, evaluate, train

ON_THE_HOST = {"matmul"}
KEY = (3, 1)


@pytest.fixture
def device(device_backend, monkeypatch):
    """Give the backend; in the interpreter, NumPy arrays go to the CUDA twins while it is running."""
    if device_backend.name == "interpreter":
        load, running = backend._load, device_backend.running

        @contextlib.contextmanager
        def routed(*args, **options):
            with running(*args, **options), pytest.MonkeyPatch.context() as patch:
                patch.setattr(backend, "_load", lambda _, op: load("cpu" if op in ON_THE_HOST else "cuda", op))
                yield

        monkeypatch.setattr(device_backend, "running", routed)
    return device_backend


def moved(device, tree):
    return {name: device.array(x) for name, x in tree.items()}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(np.float64, 1e-10, id="float64", marks=pytest.mark.slow),  # the same launches, for longer
        pytest.param(np.float32, 2e-5, id="float32"),
    ],
)
def test_a_training_step_is_that_of_the_cpu(device, dtype, tolerance):
    """The loss, all gradients, and parameters and state after an update with a clipped gradient."""
    layers, batch, seqlen = (2, 2, 5) if device.fast else (1, 1, 4)
    model = tiny(n_layer=layers, dropout=0.25)
    params, ids = random_params(model, dtype=dtype), random_tokens(model, batch, seqlen)
    optimizer, function = adamw(0.01, mask=decay_mask(params)), value_and_grad(lm.loss)

    def step(params, ids, targets):
        loss, gradients = function(params, model, ids, targets, dropout_key=KEY)
        factor, norm = clip_factor(gradients, 0.5)
        params, state = optimizer.update(gradients, optimizer.init(params), params, factor)
        return {"loss": loss, "norm": norm, "gradients": gradients, "params": params, "m": state.m, "v": state.v}

    arguments = ids, lm.next_token_labels(ids)
    expected = step(params, *arguments)
    with device.running(check=False):
        found = step(moved(device, params), *map(device.array, arguments))
    for (name, x), (_, y) in zip(tree_items(found), tree_items(expected), strict=True):
        x = device.numpy(x)
        assert np.shape(x) == np.shape(y), name
        assert error(x, y) <= tolerance, name
        assert name == "norm" or x.dtype == dtype, name


def test_tokens_are_generated_as_on_the_cpu(device):
    model, ids = tiny(n_layer=1), random_tokens(tiny(), 2, 3)
    params = random_params(model, dtype=np.float64)
    options = {"temperature": 0.9, "seed": 1}
    expected = MambaLM(model, params).generate(ids, 3, **options)
    with device.running(check=False):
        found = MambaLM(model, moved(device, params)).generate(ids, 3, **options)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, expected)


# --- on a GPU ---


@pytest.fixture
def gpu(monkeypatch):
    """Give CuPy, where a device is."""
    return sys.modules["cupy"]


def losses(run):
    return [m["loss"] for m in run.history if "loss" in m]


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_first_twenty_losses_are_those_of_the_cpu(text, tmp_path, gpu, dropout):  # noqa: F811
    options = {"steps": 20, "eval_every": 0, "d_model": 32, "batch": 4, "context": 32, "dropout": dropout}
    one, other = (
        train(runs.create(config(text, tmp_path / name, backend=name, **options))) for name in ("numpy", "cupy")
    )
    np.testing.assert_allclose(losses(other), losses(one), rtol=0, atol=1e-4)
    norms = [[m["gradient_norm"] for m in run.history if "loss" in m] for run in (one, other)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)
    assert evaluate(other)[0] == pytest.approx(evaluate(one)[0], abs=1e-4)
    assert all(isinstance(x, gpu.ndarray) for x in other.params.values())


@pytest.mark.gpu
def test_the_same_run_has_the_same_bits_also_when_it_is_interrupted(text, tmp_path, gpu):  # noqa: F811
    options = {"steps": 20, "dropout": 0.2, "backend": "cupy"}
    whole = train(runs.create(config(text, tmp_path / "whole", **options)))
    with pytest.raises(Interrupted):
        train(runs.create(config(text, tmp_path / "broken", **options)), StopAfter(3))
    train(runs.resume(tmp_path / "broken", {}))
    assert_same_run(whole.folder, tmp_path / "broken")


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "second"), [("numpy", "cupy"), ("cupy", "numpy")])
def test_a_run_goes_on_on_the_other_backend(text, tmp_path, gpu, first, second):  # noqa: F811
    options = {"steps": 12, "eval_every": 0, "checkpoint_every": 4}
    whole = train(runs.create(config(text, tmp_path / "whole", **options)))
    with pytest.raises(Interrupted):
        train(runs.create(config(text, tmp_path / "run", backend=first, **options)), StopAfter(3))
    stopped = load_training(tmp_path / "run")
    run = train(runs.resume(tmp_path / "run", {"backend": second}))
    assert stopped.step < run.step == 12
    np.testing.assert_allclose(losses(run), losses(whole), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_a_checkpoint_of_a_gpu_is_read_and_continued_on_the_cpu(text, tmp_path, gpu):  # noqa: F811
    run = train(runs.create(config(text, tmp_path / "run", backend="cupy")))
    on_cpu, on_gpu = (MambaLM.from_pretrained(run.folder, backend=name) for name in ("numpy", "cupy"))
    assert bits(on_cpu.params) == bits({name: x.get() for name, x in on_gpu.params.items()})
    ids = run.corpus.validation[None, :20]
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}):
        tokens = on_cpu.generate(ids, 50, **options)
        np.testing.assert_array_equal(on_gpu.generate(ids, 50, **options), tokens)
        np.testing.assert_array_equal(on_gpu.generate(gpu.asarray(ids), 50, **options), tokens)
    assert error(on_gpu(gpu.asarray(ids)).get(), on_cpu(ids)) <= 1e-5


@pytest.mark.gpu
def test_the_command_line_trains_samples_and_reports_on_a_gpu(capsys, text, tmp_path, gpu):  # noqa: F811
    out, options = tmp_path / "run", [*OPTIONS, "--backend", "cupy", "--steps", "30"]
    assert cli.main(["train", text, "--out", str(out), *options]) == 0
    told = capsys.readouterr()
    assert "nats per character after 30 steps" in told.out
    page = (out / "report.html").read_text()
    assert "<th>GPU</th>" in page
    assert "--backend cupy" in page
    assert cli.main(["generate", str(out), "--backend", "cupy", "--tokens", "20", "--seed", "1"]) == 0
    on_gpu = capsys.readouterr().out
    assert cli.main(["generate", str(out), "--tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out == on_gpu


@pytest.mark.gpu
def test_a_time_budget_becomes_a_plan_on_a_gpu(text, tmp_path, gpu):  # noqa: F811
    settings = config(text, tmp_path / "run", backend="cupy", steps=None, minutes=0.2, eval_every=0)
    began = time.perf_counter()
    run = train(runs.create(settings))
    assert run.step == run.plan.total > run.plan.held
    assert 4 < time.perf_counter() - began < 20


@pytest.mark.gpu
def test_a_training_step_does_not_wait_for_the_gpu(text, tmp_path, gpu):  # noqa: F811
    run = runs.create(config(text, tmp_path / "run", backend="cupy", steps=100, dropout=0.1, eval_every=0))
    loop = Loop(run, Silent(), begin=0.0)
    for _ in range(3):
        loop.step()
    import cupyx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, as it does not see every wait; those of CuPy it does
        with cupyx.allow_synchronize(False):
            for _ in range(3):
                loop._update()
    loop.collect()
    assert len(losses(run)) == 6


@pytest.mark.gpu
def test_mixed_libraries_are_refused_before_anything_is_launched(gpu):
    model = tiny()
    params, ids = random_params(model, dtype=np.float32), random_tokens(model, 2, 5)
    placed = {name: gpu.asarray(x) for name, x in params.items()}
    with pytest.raises(TypeError, match="embedding: weight is a cupy array, but input_ids is a numpy array"):
        MambaLM(model, placed)(ids)
    with pytest.raises(TypeError, match=r"adamw: params\['D'\] is a cupy array, but grads\['D'\] is a numpy array"):
        adamw(0.1).update({"D": np.ones(2)}, adamw(0.1).init({"D": gpu.ones(2)}), {"D": gpu.ones(2)})


@pytest.mark.gpu
def test_float32_products_are_not_rounded_to_tf32(gpu):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 256, 512)).astype(np.float32)
    found = algebra.linear(gpu.asarray(x), gpu.asarray(w)).get()
    assert error(found, x.astype(np.float64) @ w.T.astype(np.float64)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_types_are_multiplied_with_float32_sums(gpu, dtype):
    ones = gpu.asarray(np.ones((4, 3000), dtype))
    y, pull = pullback(algebra.linear, ones, ones)
    assert y.dtype == dtype
    assert (y.get() == dtype(3000)).all()
    dx, dw = pull(gpu.ones_like(y))
    assert dx.dtype == dw.dtype == dtype
    assert (dx.get() == dtype(4)).all()


@pytest.mark.gpu
def test_gradients_that_meet_keep_their_memory_order(gpu):
    x = gpu.asarray(np.random.default_rng(0).standard_normal((2, 5, 6))).swapaxes(1, 2)
    y, pull = pullback(lambda x: (x[:, 1:], x[:, 1:]), x)
    (dx,) = pull(y)
    assert dx.strides == x.strides
    np.testing.assert_array_equal(dx[:, 1:].get(), 2 * x[:, 1:].get())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_in_half_precision_agrees_with_the_cpu(gpu, dtype, tmp_path):
    config = tiny(d_model=32, n_layer=3)  # noqa: F811
    MambaLM(config, random_params(config, dtype=np.float32)).save_pretrained(tmp_path)
    on_cpu, on_gpu = (MambaLM.from_pretrained(tmp_path, backend=name, dtype=dtype) for name in ("numpy", "cupy"))
    ids = random_tokens(config, 2, 20)
    scores = on_gpu(gpu.asarray(ids))
    assert scores.dtype == np.float32
    assert error(scores.get(), on_cpu(ids)) <= 0.02
    assert on_gpu.generate(ids, 5, seed=0, temperature=1.0).shape == (2, 25)
