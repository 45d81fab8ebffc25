from __future__ import annotations

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npmamba.config import MambaConfig, check_options

SMALL = {"vocab_size": 65, "d_model": 32, "n_layer": 2}

# What the published mamba-130m-hf and mamba-130m files say.
PUBLISHED_HF = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536,
    "d_model": 768, "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu",
    "hidden_size": 768, "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
    "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
    "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False, "residual_in_fp32": True,
    "rms_norm": True, "ssm_cfg": {}, "state_size": 16, "time_step_floor": 0.0001,
    "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 48,
    "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
PUBLISHED_ORIGINAL = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
    "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip

# Keys that transformers' PreTrainedConfig has written into config files over the years.
HARMLESS = """
_attn_implementation_autoset _name_or_path add_cross_attention architectures auto_map bad_words_ids
begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size finetuning_task
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id fused_add_norm id2label is_decoder
is_encoder_decoder label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k
top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache use_mambapy
""".split()


@st.composite
def configs(draw: st.DrawFn) -> MambaConfig:
    vocab_size = draw(st.integers(1, 300))
    token = st.none() | st.integers(0, vocab_size - 1)
    dt_min = draw(st.floats(1e-6, 1.0))
    return MambaConfig(
        vocab_size=vocab_size,
        d_model=draw(st.integers(1, 100)),
        n_layer=draw(st.integers(1, 4)),
        d_state=draw(st.integers(1, 256)),
        d_conv=draw(st.integers(1, 8)),
        expand=draw(st.sampled_from([1, 1.5, 2, 3.25])),
        dt_rank=draw(st.sampled_from(["auto", 1, 7])),
        dt_min=dt_min,
        dt_max=dt_min * draw(st.floats(1, 100)),
        dt_init=draw(st.sampled_from(["random", "constant"])),
        conv_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        norm_eps=draw(st.floats(0, 1e-2)),
        tie_embeddings=draw(st.booleans()),
        discretization=draw(st.sampled_from(["euler", "zoh"])),
        dropout=draw(st.floats(0, 0.99)),
        eos_token_id=draw(token),
        pad_vocab_size_multiple=draw(st.integers(1, 16)),
    )


@given(configs())
def test_a_configuration_survives_its_own_file(config: MambaConfig) -> None:
    assert MambaConfig.from_json(config.to_json()) == config
    assert MambaConfig.from_dict(dataclasses.asdict(config)) == config
    assert MambaConfig.from_json(config.to_json()).to_json() == config.to_json()


@given(configs())
def test_parameter_count_is_the_sum_over_the_table(config: MambaConfig) -> None:
    shapes = config.parameter_shapes()
    assert config.parameter_count() == sum(math.prod(shape) for shape in shapes.values())
    assert all(size >= 1 for shape in shapes.values() for size in shape)
    assert ("lm_head.weight" in shapes) != config.tie_embeddings


@given(configs())
def test_the_embedding_has_the_least_multiple_of_rows_that_holds_the_vocabulary(config: MambaConfig) -> None:
    rows = config.parameter_shapes()["backbone.embeddings.weight"][0]
    assert rows == config.padded_vocab_size
    assert rows % config.pad_vocab_size_multiple == 0
    assert 0 <= rows - config.vocab_size < config.pad_vocab_size_multiple


@pytest.mark.parametrize(
    ("n_layer", "d_model", "parameters"),
    [(24, 768, 129135360), (48, 1024, 371516416), (48, 1536, 793204224), (48, 2048, 1372178432),
     (64, 2560, 2768345600)],
)  # fmt: skip
def test_published_sizes_have_the_published_parameter_counts(n_layer: int, d_model: int, parameters: int) -> None:
    config = MambaConfig(50277, d_model, n_layer, pad_vocab_size_multiple=8)
    assert config.parameter_count() == parameters


def test_the_table_of_130m_is_the_published_one() -> None:
    shapes = MambaConfig.from_dict(PUBLISHED_HF).parameter_shapes()
    layer = "backbone.layers.23."
    assert {key.removeprefix(layer): shape for key, shape in shapes.items() if key.startswith(layer)} == {
        "norm.weight": (768,),
        "mixer.in_proj.weight": (3072, 768),
        "mixer.conv1d.weight": (1536, 1, 4),
        "mixer.conv1d.bias": (1536,),
        "mixer.x_proj.weight": (80, 1536),
        "mixer.dt_proj.weight": (1536, 48),
        "mixer.dt_proj.bias": (1536,),
        "mixer.A_log": (1536, 16),
        "mixer.D": (1536,),
        "mixer.out_proj.weight": (768, 1536),
    }
    assert shapes["backbone.embeddings.weight"] == (50280, 768)
    assert shapes["backbone.norm_f.weight"] == (768,)
    assert len(shapes) == 24 * 10 + 2


def test_both_published_files_describe_the_same_model() -> None:
    hf = MambaConfig.from_dict(PUBLISHED_HF)
    original = MambaConfig.from_dict(PUBLISHED_ORIGINAL)
    assert hf.parameter_shapes() == original.parameter_shapes()
    assert (hf.vocab_size, original.vocab_size) == (50280, 50277)
    assert hf.norm_eps == original.norm_eps == 1e-5


def test_what_hugging_face_leaves_out_has_its_defaults() -> None:
    config = MambaConfig.from_dict({"model_type": "mamba"})
    assert (config.vocab_size, config.d_model, config.n_layer, config.bias) == (50280, 768, 32, True)
    assert (config.eos_token_id, config.tie_embeddings, config.discretization) == (0, True, "euler")


def test_the_draw_that_hugging_face_calls_uniform_is_random() -> None:
    assert MambaConfig.from_dict(PUBLISHED_HF | {"time_step_init_scheme": "uniform"}).dt_init == "random"


def test_the_original_file_may_set_the_mixer() -> None:
    ssm = {"d_state": 8, "expand": 1.5, "dt_rank": "auto", "bias": True, "use_fast_path": False}
    config = MambaConfig.from_dict(PUBLISHED_ORIGINAL | {"ssm_cfg": ssm | {"layer": "Mamba1"}})
    assert (config.d_state, config.d_inner, config.dt_rank, config.bias) == (8, 1152, 48, True)


def test_the_written_file_is_what_transformers_reads() -> None:
    data = json.loads(MambaConfig(**SMALL, pad_vocab_size_multiple=8, discretization="zoh").to_json("bfloat16"))
    assert data["architectures"] == ["MambaForCausalLM"]
    assert (data["model_type"], data["vocab_size"], data["torch_dtype"]) == ("mamba", 72, "bfloat16")
    assert (data["hidden_size"], data["intermediate_size"], data["num_hidden_layers"]) == (32, 64, 2)
    assert data["npmamba"] == {
        "vocab_size": 65, "pad_vocab_size_multiple": 8, "discretization": "zoh", "dropout": 0.0,
        "rescale_prenorm_residual": True,
    }  # fmt: skip
    assert data["rescale_prenorm_residual"] is False  # transformers would rescale the weights that it loads
    assert MambaConfig.from_dict(data).rescale_prenorm_residual
    assert set(PUBLISHED_HF) - set(data) <= {
        "d_inner", "d_model", "n_layer", "fused_add_norm", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg",
        "transformers_version", "use_cache",
    }  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_metadata_is_ignored(key: str) -> None:
    assert MambaConfig.from_dict(PUBLISHED_HF | {key: "anything"}) == MambaConfig.from_dict(PUBLISHED_HF)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("hiden_size", "hidden_size"), ("n_layers", "n_layer"), ("vocabsize", "vocab_size"),
     ("state_sise", "state_size"), ("time_step_ranks", "time_step_rank"), ("use_bais", "use_bias"),
     ("rmsnorm", "rms_norm")],
)  # fmt: skip
def test_a_misspelt_key_names_the_one_it_resembles(key: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        MambaConfig.from_dict(PUBLISHED_HF | {key: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba2"}, "model_type='mamba2'; expected 'mamba'"),
        ({"model_type": "falcon_mamba"}, "model_type='falcon_mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; expected 'silu'"),
        ({"rms_norm": False}, "rms_norm=False; expected True"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\]"),
        ({"d_intermediate": 8}, "d_intermediate=8; expected 0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer='Mamba2'"),
        ({"ssm_cfg": {"d_state": 8}}, "ssm_cfg.d_state=8; expected 16"),
        ({"intermediate_size": 1500}, "intermediate_size=1500; expected 1536"),
        ({"d_model": 512}, "d_model=512; expected 768"),
        ({"npmamba": {"discretisation": "zoh"}}, "did you mean 'discretization'"),
        ({"npmamba": 3}, "npmamba=3; expected a dictionary"),
        ({"npmamba": {"vocab_size": 100}}, "vocab_size=50280; expected 100"),
        ({"vocab_size": None}, "vocab_size=None; expected an integer"),
        ({"ssm_cfg": 5}, "ssm_cfg=5; expected a dictionary"),
    ],
)
def test_a_file_that_describes_another_model_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MambaConfig.from_dict(PUBLISHED_HF | change)


HUGE = '{"a": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "[" * 100_000, HUGE, "{}"])
def test_text_that_is_no_configuration_is_refused(text: str) -> None:
    with pytest.raises((TypeError, ValueError), match="MambaConfig"):
        MambaConfig.from_json(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 10**12}, "vocab_size=1000000000000; expected an integer from 1 to"),
        ({"vocab_size": 2**63}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": True}, "vocab_size=True; expected an integer"),
        ({"vocab_size": np.array([3])}, "vocab_size"),
        ({"d_model": -3}, "d_model=-3; expected an integer from 1"),
        ({"d_model": 64.0}, "d_model=64.0; expected an integer"),
        ({"d_model": "64"}, "d_model='64'"),
        ({"d_model": [64]}, r"d_model=\[64\]"),
        ({"d_model": 10**5000}, "d_model=a value too long"),
        ({"d_model": 2**20, "n_layer": 2**14}, "parameters; expected at most"),
        ({"vocab_size": 2**31 - 1, "d_model": 64}, "parameters; expected at most"),
        ({"n_layer": 10**18}, "n_layer"),
        ({"d_state": 257}, "d_state=257; expected an integer from 1 to 256"),
        ({"d_conv": 0}, "d_conv=0"),
        ({"expand": math.nan}, "expand=nan"),
        ({"expand": math.inf}, "expand=inf"),
        ({"expand": 10**400}, "expand="),
        ({"expand": 0.01}, "expand=0.01; expected at least 1 / d_model"),
        ({"expand": None}, "expand=None; expected a number"),
        ({"dt_rank": 0}, "dt_rank=0"),
        ({"dt_rank": "automatic"}, "dt_rank='automatic'"),
        ({"dt_min": 0.2}, "dt_min=0.2; expected at most dt_max=0.1"),
        ({"dt_scale": 10**400}, "dt_scale"),
        ({"norm_eps": -1e-5}, "norm_eps=-1e-05"),
        ({"dropout": 1}, "dropout=1; expected a number from 0 up to"),
        ({"bias": 1}, "bias=1; expected True or False"),
        ({"dt_init": "uniform"}, "dt_init='uniform'; expected 'random' or 'constant'"),
        ({"discretization": ["zoh"]}, "discretization"),
        ({"eos_token_id": 65}, "eos_token_id=65; expected an integer from 0 to 64"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
    ],
)
def test_absurd_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"MambaConfig: .*{message}"):
        MambaConfig(**(SMALL | options))


def test_unknown_options_name_the_nearest_known_one() -> None:
    with pytest.raises(TypeError, match="MambaConfig: unknown option 'd_stat'; did you mean 'd_state'"):
        MambaConfig(**SMALL, d_stat=3)
    with pytest.raises(TypeError, match="known are a, b"):
        check_options("here", ["zzzzzz"], ["a", "b"])


def test_numpy_numbers_become_python_numbers_and_the_config_is_a_value() -> None:
    config = MambaConfig(vocab_size=np.int64(65), d_model=np.int32(32), n_layer=2, expand=np.float64(1.5))
    assert config == MambaConfig(65, 32, 2, expand=1.5)
    assert hash(config) == hash(MambaConfig(65, 32, 2, expand=1.5))
    assert json.loads(config.to_json())["expand"] == 1.5
    assert type(config.vocab_size) is int
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, n_layer=3).n_layer == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # type: ignore[misc]
