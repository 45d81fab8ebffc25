"""Hugging Face's transformers and npmamba read each other's checkpoints and compute the same model.

The checkpoints are made here, at random, and no weight has the value that an initialization would give it, so no
parameter can be left out or mixed up unnoticed. Nothing is downloaded. transformers runs its plain PyTorch path.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

# Libraries that transformers would prefer to its own code.
FAST_PATHS = ("mamba_ssm", "causal_conv1d", "kernels")
OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO", "TRANSFORMERS_VERBOSITY": "error"}

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "biases, short conv": {
        "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 2, "expand": 1,
        "use_bias": True, "tie_word_embeddings": True,
    },
    "no biases, untied, explicit rank": {
        "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 3, "expand": 2,
        "use_bias": False, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 5,
    },
    "as published": {
        "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "conv_kernel": 4, "expand": 2,
        "use_bias": False, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3,
    },
    "odd sizes": {
        "vocab_size": 65, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 5, "conv_kernel": 4, "expand": 1,
        "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_rank": 7,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def transformers(torch: ModuleType) -> Iterator[ModuleType]:
    """The library, which takes its plain PyTorch path and asks no server for anything."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        for name in FAST_PATHS:
            patch.setitem(sys.modules, name, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the insides of the two libraries
            library = pytest.importorskip("transformers")
            _ = library.MambaForCausalLM  # imports lazily, and decides there which path to take
        yield library


SPREAD = {"A_log": 0.3, "D": 0.5, "norm.weight": 0.3, "norm_f.weight": 0.3, "bias": 0.3, "conv1d.weight": 0.3}


def randomize(model: Any, torch: Any, seed: int) -> None:
    """Give every parameter a random part that shows in the logits, small enough that rounding errors stay small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = next((scale for end, scale in SPREAD.items() if name.endswith(end)), parameter.shape[-1] ** -0.5)
        parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))


def make(transformers: Any, torch: Any, options: dict[str, Any], seed: int) -> Any:
    config = transformers.MambaConfig(**options, initializer_range=0.1, eos_token_id=None, use_mambapy=False)
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    randomize(model, torch, seed)
    return model


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: Any, transformers: Any, torch: Any, tmp_path_factory: Any) -> tuple[Any, Any]:
    """The model of transformers, and ours loaded from what it saved."""
    from npmamba import MambaLM

    theirs = make(transformers, torch, CHECKPOINTS[request.param], seed=len(request.param))
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    return theirs, MambaLM.from_pretrained(folder)


def tokens(model: Any, batch: int = 3, seqlen: int = 37) -> np.ndarray:
    return np.random.default_rng(7).integers(0, model.config.vocab_size, (batch, seqlen))


def their_logits(model: Any, torch: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def error(x: Any, reference: Any) -> float:
    """The largest difference, relative to the largest reference value."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def test_logits_are_those_of_transformers(pair, torch):
    theirs, ours = pair
    ids = tokens(theirs)
    logits = ours(ids)
    assert logits.dtype == np.float32
    assert error(logits, their_logits(theirs, torch, ids)) <= 1e-5


def test_loss_and_every_gradient_are_those_of_transformers(pair, torch):
    theirs, ours = pair
    ids = tokens(theirs, seqlen=23)
    labels = np.where(np.random.default_rng(1).random(ids.shape) < 0.2, -100, ids)
    theirs.zero_grad()
    reference = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels), use_cache=False).loss
    reference.backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    loss, gradients = ours.loss_and_grads(ids, labels)
    assert error(loss, reference.item()) <= 1e-5
    assert sorted(gradients) == sorted(expected)
    errors = {name: error(gradients[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-4, errors


def test_greedy_continuations_are_those_of_transformers(pair, torch):
    theirs, ours = pair
    ids = tokens(theirs, seqlen=11)
    greedy = {"do_sample": False, "use_cache": True, "max_new_tokens": 50, "pad_token_id": 0}
    mask = torch.ones(ids.shape, dtype=torch.long)
    with torch.no_grad():
        expected = theirs.generate(torch.from_numpy(ids), attention_mask=mask, **greedy).numpy()
    assert expected.shape == (3, 61)
    assert len(np.unique(expected[:, 11:])) >= 5  # otherwise two wrong models could agree
    np.testing.assert_array_equal(ours.generate(ids, 50), expected)


def load(transformers: Any, torch: Any, folder: Path) -> Any:
    model, info = transformers.MambaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_transformers_loads_what_npmamba_saved(pair, transformers, torch, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    again = load(transformers, torch, tmp_path)
    ids = tokens(theirs)
    assert error(their_logits(again, torch, ids), their_logits(theirs, torch, ids)) <= 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_new_model_of_npmamba(tied, transformers, torch, tmp_path):
    from npmamba import MambaConfig, MambaLM

    # A new model's config says how it was initialized, and transformers must not do any of that to the weights again.
    config = MambaConfig(vocab_size=50, d_model=32, n_layer=2, tie_embeddings=tied, initializer_range=1.0)
    ours = MambaLM(config, seed=3)
    ours.save_pretrained(tmp_path)
    theirs = load(transformers, torch, tmp_path)
    ids = tokens(theirs)
    assert error(ours(ids), their_logits(theirs, torch, ids)) <= 1e-5


@pytest.mark.parametrize("name", ["biases, short conv", "no biases, untied, explicit rank"])
def test_bfloat16_checkpoints_load_as_float32(name, transformers, torch, tmp_path):
    from npmamba import MambaLM

    make(transformers, torch, CHECKPOINTS[name], seed=5).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = load(transformers, torch, tmp_path)
    ids = tokens(theirs)
    for dtype in (None, np.float32):
        ours = MambaLM.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in ours.params.values()} == {np.dtype(np.float32)}
        assert error(ours(ids), their_logits(theirs, torch, ids)) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_loads_half_precision_that_npmamba_saved(dtype, transformers, torch, tmp_path):
    from npmamba import MambaLM

    make(transformers, torch, CHECKPOINTS["as published"], seed=6).save_pretrained(tmp_path / "theirs")
    MambaLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours", dtype=dtype)
    theirs, ours = load(transformers, torch, tmp_path / "ours"), MambaLM.from_pretrained(tmp_path / "ours")
    ids = tokens(theirs)
    assert error(ours(ids), their_logits(theirs, torch, ids)) <= 1e-5
