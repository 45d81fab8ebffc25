"""Files that are whole or absent, safetensors files, models and training runs."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from npmamba import checkpoint, files, tensorfile, training_state
from npmamba.checkpoint import (
    load_model,
    load_tensors,
    load_training,
    save_model,
    save_tensors,
    save_training,
)
from npmamba.config import MambaConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(name) for name in tensorfile.DTYPES]
CONFIG = MambaConfig(vocab_size=11, d_model=8, n_layer=2, pad_vocab_size_multiple=4, discretization="zoh")
SEEDS = st.integers(0, 2**32 - 1)


def params_of(config: MambaConfig, dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = config.parameter_shapes().items()
    return {key: rng.standard_normal(shape, np.float32).astype(dtype) for key, shape in shapes}


def same_bits(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(files._SUFFIX)]


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Arrays of any supported dtype, bits and memory layout; NaN payloads and all."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rng = np.random.default_rng(draw(SEEDS))
    octets = rng.integers(0, 2 if dtype == np.bool_ else 256, (*shape, dtype.itemsize), np.uint8)
    array = np.ascontiguousarray(octets).view(dtype).reshape(shape)
    layout = draw(st.sampled_from(["C", "F", "transposed", "reversed", "strided", "swapped", "broadcast"]))
    if layout == "F":
        return np.asfortranarray(array)
    if layout == "transposed":
        return array.T
    if layout == "reversed":
        return array[tuple(slice(None, None, -1) for _ in shape)] if shape else array
    if layout == "strided":
        return np.repeat(array, 2, -1)[..., ::2] if shape else array
    if layout == "swapped" and dtype != BFLOAT16:
        return array.astype(dtype.newbyteorder(">"))
    return np.broadcast_to(array, (2, *shape)) if layout == "broadcast" else array


@given(st.dictionaries(st.text(max_size=9).filter(lambda s: s != "__metadata__"), arrays(), max_size=5))
def test_arrays_survive_saving_and_equal_arrays_make_equal_bytes(tensors: dict[str, np.ndarray]) -> None:
    tensors = {name.encode("utf-8", "replace").decode(): array for name, array in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        save_tensors(a, tensors, {"note": "é"})
        loaded = load_tensors(a)
        with tensorfile.TensorFile(a) as file:
            assert file.metadata == {"note": "é"}
        save_tensors(b, dict(reversed(loaded.items())), {"note": "é"})
        assert a.read_bytes() == b.read_bytes()
        assert sorted(os.listdir(folder)) == ["a", "b"]
    assert list(loaded) == sorted(tensors)
    for name, array in tensors.items():
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
        assert same_bits(loaded[name], native)
        assert loaded[name].flags.c_contiguous
        assert loaded[name].flags.writeable


@given(SEEDS)
def test_a_mutated_file_loads_or_is_refused_by_name(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {"a": np.arange(6, dtype=np.float32), "b": np.ones(3, np.uint8)}
    data = bytearray(tensorfile.encode(tensors, {"k": "v"}))
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, min(len(data), 150)))
        match rng.integers(4):
            case 0:
                data[at] = rng.integers(256)
            case 1:
                data[at] = int(rng.choice(list(b'0123456789-.e"[]{},:')))
            case 2:
                del data[at : at + int(rng.integers(1, 9))]
            case _:
                data[at:at] = data[at : at + int(rng.integers(1, 9))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(data)
        message = str(path)
        try:
            load_tensors(path)
        except ValueError as error:  # and nothing else
            message = str(error)
        assert str(path) in message


def file_of(dtype: str, *shape: int, size: int = 4) -> bytes:
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"1234"[:size]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete safetensors file"),
        (b"PK\x03\x04abcdefgh", "PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (file_of("F32", 2), "not a complete safetensors file"),
        (file_of("F8_E4M3", 4), "tensor 'a' cannot be read: .*float8_e4m3"),
        (file_of("F32", 0, 2**62, 2**62, size=0), "tensor 'a' cannot be read"),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_tensors(path, {"a": np.arange(3.0), "b": np.ones((2, 2), np.float16)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_tensors(path)


def test_what_is_no_file_or_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "absent")
    with pytest.raises(OSError, match=str(tmp_path)):
        load_tensors(tmp_path)
    for value, message in [([1.0], "w must be an array, got list"), (np.array(["x"]), "w has dtype <U1")]:
        with pytest.raises(TypeError, match=message):
            save_tensors(tmp_path / "x", {"w": value})
    with pytest.raises(TypeError, match="__metadata__"):
        save_tensors(tmp_path / "x", {"__metadata__": np.ones(1)})
    with pytest.raises(TypeError, match="MaskedArray"):
        save_tensors(tmp_path / "x", {"w": np.ma.ones(2)})
    assert os.listdir(tmp_path) == []


def test_an_open_file_keeps_its_content_when_a_new_one_takes_its_name(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": np.zeros(3)})
    with tensorfile.TensorFile(tmp_path / "x") as file:
        save_tensors(tmp_path / "x", {"a": np.ones(1000)})
        array = file.read("a")
    assert array.tolist() == [0.0] * 3


class FakeDisk:
    """os.write and os.fsync that stop working after some bytes or calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, room: int, syncs: int = 10**9) -> None:
        self.code, self.room, self.syncs, self.real, self.sync = code, room, syncs, os.write, os.fsync
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def write(self, descriptor: int, data: Any) -> int:
        if self.room <= 0:
            raise OSError(self.code, os.strerror(self.code))
        # Odd, short writes, as a nearly full disk makes them.
        done = self.real(descriptor, bytes(data[: min(self.room, 37)]))
        self.room -= done
        return done

    def fsync(self, descriptor: int) -> None:
        self.syncs -= 1
        if self.syncs < 0:
            raise OSError(self.code, os.strerror(self.code))
        self.sync(descriptor)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_or_broken_disk_leaves_the_earlier_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save_training(tmp_path, 1, CONFIG, {"w": np.arange(200.0)}, None)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    for room in (*range(0, len(before), 97), len(before) - 1):
        with monkeypatch.context() as patch:
            FakeDisk(patch, code, room)
            with pytest.raises(OSError, match="could not write .*checkpoint.safetensors: .*unchanged") as caught:
                save_training(tmp_path, 2, CONFIG, {"w": np.ones(200)}, None)
        assert caught.value.errno == code
        assert os.listdir(tmp_path) == ["checkpoint.safetensors"]
    with monkeypatch.context() as patch:
        FakeDisk(patch, code, 10**9, syncs=0)
        with pytest.raises(OSError, match="unchanged"):
            save_training(tmp_path, 2, CONFIG, {"w": np.ones(200)}, None)
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    with monkeypatch.context() as patch:
        FakeDisk(patch, code, 10**9)
        save_training(tmp_path, 2, CONFIG, {"w": np.ones(200)}, None)
    assert load_training(tmp_path).step == 2


def test_a_full_disk_leaves_the_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, CONFIG, params_of(CONFIG))
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert before.keys() == {"config.json", "model.safetensors"}
    other = MambaConfig(vocab_size=5, d_model=16, n_layer=1)
    for room in (0, 300, 5000):
        with monkeypatch.context() as patch:
            FakeDisk(patch, errno.ENOSPC, room)
            with pytest.raises(OSError, match="No space left on device"):
                save_model(tmp_path, other, params_of(other))
        assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


CHILD = """
import sys, numpy as np
from npmamba.checkpoint import save_training
from npmamba.config import MambaConfig
config = MambaConfig(vocab_size=8, d_model=4, n_layer=1)
limit = int(sys.argv[2])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
step = 0
while True:
    step += 1
    w = np.full(200_000, step, np.float32)
    save_training(sys.argv[1], step, config, {"w": w}, {"m": {"w": -w}, "count": step}, {"seed": step})
    print(step, flush=True)
"""
POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Any]:
    children: list[subprocess.Popen[str]] = []

    def start(limit: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path), str(limit)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@POSIX
def test_a_process_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path, saver: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        child = saver()
        assert child.stdout.readline() == "1\n"
        time.sleep(rng.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        acknowledged = int((["1", *child.communicate()[0].split()])[-1])
        state = load_training(tmp_path)
        # The print may have been cut off between the rename and it, but never the other way round.
        assert state.step in (acknowledged, acknowledged + 1)
        assert (state.params["w"] == state.step).all()
        assert (state.opt_state["m"]["w"] == -state.step).all()
        assert state.opt_state["count"] == state.extra["seed"] == state.step
        assert len(litter(tmp_path)) <= 1
    save_training(tmp_path, 0, CONFIG, {}, None)
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


@POSIX
def test_a_limit_on_file_size_is_reported_and_leaves_nothing(tmp_path: Path, saver: Any) -> None:
    error = saver(limit=500_000).communicate()[1]
    assert "could not write" in error
    assert "File too large" in error
    assert os.listdir(tmp_path) == []


def test_litter_is_swept_only_when_its_process_is_dead(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    names = {
        "dead": f".{path.name}.{files._HOST}.{2**22 + 1}.0.{files._SUFFIX}",
        "earlier life": f".{path.name}.{files._HOST}.{os.getpid()}.999999.{files._SUFFIX}",
        "alive": f".{path.name}.{files._HOST}.{os.getppid()}.0.{files._SUFFIX}",
        "other machine": f".{path.name}.elsewhere.{2**22 + 1}.0.{files._SUFFIX}",
        "other file": f".y.{files._HOST}.{2**22 + 1}.0.{files._SUFFIX}",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"")
    with files.atomic_write(path) as write:
        write(b"1")
        files.sweep(path)  # a second writer must not sweep what this one is writing
    left = set(os.listdir(tmp_path))
    assert left == {path.name, names["alive"], names["other machine"], names["other file"]}


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "x").symlink_to(tmp_path / "disk" / "x")
    save_tensors(tmp_path / "x", {"a": np.ones(2)})
    assert (tmp_path / "x").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["x"]


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with files.atomic_write(tmp_path / "x") as write:
            write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("tie", [True, False])
def test_saving_a_loaded_model_again_gives_the_same_bytes(tmp_path: Path, dtype: str, tie: bool) -> None:
    config = MambaConfig(**{**vars(CONFIG), "tie_embeddings": tie, "bias": not tie})
    params = params_of(config, np.float64)
    save_model(tmp_path / "a", config, params, dtype)
    loaded_config, loaded = load_model(tmp_path / "a", dtype)
    save_model(tmp_path / "b", loaded_config, dict(reversed(loaded.items())))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert loaded_config == config
    assert list(loaded) == list(config.parameter_shapes())
    for key, array in loaded.items():
        kept = dtype in ("float16", "bfloat16") and key.endswith(("A_log", ".D", "dt_proj.bias"))
        assert array.dtype.name == ("float32" if kept else dtype)
        np.testing.assert_array_equal(array, params[key].astype(array.dtype))


@pytest.mark.parametrize(
    ("stored", "loaded"), [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_half_precision_becomes_float32_unless_asked_otherwise(tmp_path: Path, stored: str, loaded: str) -> None:
    params = params_of(CONFIG, np.dtype(stored))
    save_model(tmp_path, CONFIG, params)
    found = load_model(tmp_path)[1]
    assert {array.dtype.name for array in found.values()} == {loaded}
    assert all(np.array_equal(found[key], params[key].astype(loaded)) for key in params)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == stored


def test_transformers_finds_what_it_asks_for(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, params_of(CONFIG))
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(CONFIG.parameter_shapes())
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 12


def write_files(folder: Path, config: MambaConfig, tensors: dict[str, np.ndarray], **change: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict() | change))
    save_tensors(folder / "model.safetensors", tensors)


def test_the_original_spelling_and_a_repeated_head_are_accepted(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    tensors = {key.replace("embeddings", "embedding"): array for key, array in params.items()}
    tensors["lm_head.weight"] = params["backbone.embeddings.weight"]
    save_tensors(tmp_path / "model.safetensors", tensors)
    original = {"d_model": 8, "n_layer": 2, "vocab_size": 11, "pad_vocab_size_multiple": 4, "ssm_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(original))
    config, loaded = load_model(tmp_path)
    assert (config.vocab_size, config.padded_vocab_size) == (11, 12)
    assert loaded.keys() == params.keys()
    assert all(same_bits(loaded[key], params[key]) for key in params)


def test_a_head_that_differs_from_tied_embeddings_is_refused(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    write_files(tmp_path, CONFIG, params | {"lm_head.weight": params["backbone.embeddings.weight"] + 1})
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_model(tmp_path)
    write_files(
        tmp_path,
        CONFIG,
        params | {"lm_head.weight": params["backbone.embeddings.weight"] + 1},
        tie_word_embeddings=False,
    )
    assert "lm_head.weight" in load_model(tmp_path)[1]


def test_all_that_does_not_fit_is_listed_at_once(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    layer = "backbone.layers.1.mixer."
    params[layer + "A_lg"] = params.pop(layer + "A_log")
    params["backbone.norm_f.weight"] = np.ones(9, np.float32)
    del params[layer + "conv1d.bias"]
    write_files(tmp_path, CONFIG, params)
    with pytest.raises(ValueError, match="do not fit the config") as caught:
        load_model(tmp_path)
    for part in (
        str(tmp_path),
        f"missing {layer}conv1d.bias (16,)",
        f"missing {layer}A_log (16, 16)",
        f"unexpected {layer}A_lg (16, 16), did you mean {layer}A_log?",
        "backbone.norm_f.weight has shape (9,); expected (8,)",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="save_model: .*\n  missing"):
        save_model(tmp_path, CONFIG, params)


def test_many_misfits_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"and 22 more\Z"):
        save_model(tmp_path, MambaConfig(vocab_size=8, d_model=4, n_layer=4), {})


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(FileNotFoundError, match="(?s)pytorch_model.bin.*can run code.*safetensors.torch"):
        load_model(tmp_path)


def test_a_missing_folder_says_how_to_fetch_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not download models.*hf download"):
        load_model("state-spaces/mamba-130m-hf")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not a JSON file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="config.json: MambaConfig: model_type='gpt2'"):
        load_model(tmp_path)


def write_shards(folder: Path, params: dict[str, np.ndarray]) -> dict[str, str]:
    (folder / "config.json").write_text(CONFIG.to_json())
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(params)}
    for shard in set(names.values()):
        save_tensors(folder / shard, {key: params[key] for key in params if names[key] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return names


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    write_shards(tmp_path, params)
    loaded = load_model(tmp_path)[1]
    assert all(same_bits(loaded[key], params[key]) for key in params)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "x.bin", 3, None])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    names = write_shards(tmp_path, params_of(CONFIG))
    names["backbone.norm_f.weight"] = name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ValueError, match="is not the name of a safetensors file in this folder"):
        load_model(tmp_path)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    names = write_shards(tmp_path, params)
    twice = {key: params[key] for key in params if names[key].startswith("model-00002")}
    save_tensors(
        tmp_path / "model-00002-of-00002.safetensors",
        twice | {next(iter(params)): params[next(iter(params))]},
    )
    with pytest.raises(ValueError, match="model-00002.*stands in .*model-00001"):
        load_model(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="no weight_map"):
        load_model(tmp_path)


def test_dtypes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    params = params_of(CONFIG) | {"backbone.norm_f.weight": np.full(8, 1e5, np.float32)}
    with pytest.raises(ValueError, match="backbone.norm_f.weight has values beyond the largest float16"):
        save_model(tmp_path, CONFIG, params, "float16")
    for dtype in ("int8", "complex64", "float12", 3):
        with pytest.raises(TypeError, match="dtype must be one of float16, bfloat16"):
            save_model(tmp_path, CONFIG, params, dtype)
    write_files(tmp_path, CONFIG, params | {"backbone.norm_f.weight": np.ones(8, np.int8)})
    with pytest.raises(ValueError, match="backbone.norm_f.weight has dtype int8"):
        load_model(tmp_path)


class Moments(NamedTuple):
    step: int
    m: Any
    v: Any


@st.composite
def trees(draw: st.DrawFn) -> Any:
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | arrays()
    keys = st.text(max_size=4)
    return draw(
        st.recursive(
            leaves,
            lambda t: st.dictionaries(keys, t, max_size=3) | st.lists(t, max_size=3) | st.tuples(t, t),
            max_leaves=8,
        )
    )


def equal_trees(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal_trees(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal_trees, a, b))
    if isinstance(a, np.ndarray):
        return same_bits(np.array(a, a.dtype.newbyteorder("="), order="C"), b)
    return type(a) is type(b) and a == b


@given(trees(), trees())
def test_any_tree_survives_and_saving_it_again_gives_the_same_bytes(opt_state: Any, extra: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        save_training(a, 3, CONFIG, {"x": np.ones(2)}, opt_state, extra)
        state = load_training(a)
        save_training(b, *state)
        name = training_state.TRAINING_FILE
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert (state.step, state.config) == (3, CONFIG)
    assert equal_trees(opt_state, state.opt_state)
    assert equal_trees(extra, state.extra)


def test_a_run_resumes_with_its_named_tuples_its_order_and_its_generator(tmp_path: Path) -> None:
    params = dict(reversed(params_of(CONFIG).items()))
    fresh = Moments(0, {key: np.zeros_like(x) for key, x in params.items()}, [None])
    rng = np.random.Generator(np.random.Philox(5))
    rng.standard_normal(3)
    extra = {"rng": rng.bit_generator.state, "best": float("inf"), "losses": [1.5, 2.5]}
    save_training(tmp_path, 9, CONFIG, params, fresh._replace(step=9), extra)
    state = load_training(tmp_path, like=fresh)
    assert isinstance(state.opt_state, Moments)
    assert state.opt_state.step == 9
    assert list(state.params) == list(state.opt_state.m) == list(params)
    assert state.extra["best"] == float("inf")
    again = np.random.Generator(np.random.Philox(0))
    again.bit_generator.state = state.extra["rng"]
    assert again.standard_normal() == rng.standard_normal()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (Moments(0, {"w": np.zeros(3)}, None), r"opt_state.m.w has float64 \(2,\); expected float64 \(3,\)"),
        (Moments(0, {"w": np.zeros(2, np.float32)}, None), "expected float32"),
        (Moments(0, {"u": np.zeros(2)}, None), r"opt_state.m has \['w'\]; expected \['u'\]"),
        (Moments(0, [np.zeros(2)], None), "opt_state.m has dict; expected list of 1"),
        (Moments(0, {"w": np.zeros(2)}, 5), "opt_state.v has NoneType; expected a number"),
        ({"velocity": 0}, "expected .'velocity'."),
    ],
)
def test_another_optimizers_state_is_refused(tmp_path: Path, like: Any, message: str) -> None:
    save_training(tmp_path, 1, CONFIG, {}, Moments(1, {"w": np.ones(2)}, None))
    with pytest.raises(ValueError, match="load_training: .*" + message):
        load_training(tmp_path, like=like)


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="save_training: optimizer.hook is a function"):
        save_training(tmp_path, 1, CONFIG, {}, {"hook": params_of})
    with pytest.raises(TypeError, match="extra has keys that are not strings"):
        save_training(tmp_path, 1, CONFIG, {}, {}, {3: 4})
    with pytest.raises(FileNotFoundError, match="no training to resume"):
        load_training(tmp_path)
    save_tensors(tmp_path / training_state.TRAINING_FILE, {"w": np.ones(1)})
    with pytest.raises(ValueError, match="no training checkpoint"):
        load_training(tmp_path)


def test_arrays_of_one_path_stay_apart(tmp_path: Path) -> None:
    tree = {"a.b": np.zeros(2), "a": {"b": np.ones(3)}, "a.b'": np.full(1, 5)}
    save_training(tmp_path, 1, CONFIG, tree, None)
    assert equal_trees(tree, load_training(tmp_path).params)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"set": []}, "TypeError: a tree has no 'set'"),
        ({"value": [1]}, "TypeError: a tree has no 'value'"),
        ({"list": [{}]}, "TypeError: a node of a tree is of 0 kinds"),
        ({"list": [{"value": 1, "array": "w"}]}, "TypeError: a node of a tree is of 2 kinds"),
        ({"list": 3}, "TypeError: "),
    ],
)
def test_a_tree_of_no_known_kind_is_refused(tmp_path: Path, tree: Any, message: str) -> None:
    nothing = {"value": None}
    refuse_training(tmp_path, training(trees={"params": tree, "optimizer": nothing, "extra": nothing}), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError: "),
        ('{"step": 1%s}' % ("0" * 5000), "ValueError: "),  # noqa: UP031  a brace begins it
        ("[]", "TypeError: "),
        ("{}", "KeyError: 'step'"),
        ({"step": "x"}, "TypeError: its step is 'x'"),
        ({"step": None}, "TypeError: its step is None"),
        ({"config": {}}, "ValueError: "),
        ({"config": CONFIG.to_dict() | {"d_model": -3}}, "ValueError: MambaConfig: d_model"),
        ({"config": CONFIG.to_dict() | {"d_model": "x"}}, "ValueError: MambaConfig: d_model"),
        ({"trees": {"params": {"value": None}}}, "KeyError: 'optimizer'"),
    ],
)
def test_whatever_of_a_training_checkpoint_is_broken_its_file_is_named(
    tmp_path: Path, content: Any, message: str
) -> None:
    refuse_training(tmp_path, content if isinstance(content, str) else training(**content), message)


def training(**changed: Any) -> str:
    """Return what a training checkpoint says of its arrays, with something changed."""
    trees = dict.fromkeys(("params", "optimizer", "extra"), {"value": None})
    return json.dumps({"version": 1, "step": 1, "config": CONFIG.to_dict(), "trees": trees} | changed)


def refuse_training(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / training_state.TRAINING_FILE
    save_tensors(file, {"w": np.ones(1)}, {"npmamba": content})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: no training checkpoint: {message}"):
        load_training(tmp_path)


def test_a_training_run_loads_as_a_model(tmp_path: Path) -> None:
    params = params_of(CONFIG, np.float16)
    save_training(tmp_path, 1, CONFIG, params, {"m": params})
    config, loaded = load_model(tmp_path)
    assert config == CONFIG
    assert all(np.array_equal(loaded[key], params[key].astype(np.float32)) for key in params)
    assert load_model(tmp_path, "float64")[1]["backbone.norm_f.weight"].dtype == np.float64
    save_training(tmp_path, 1, CONFIG, {"w": np.ones(1)}, None)
    with pytest.raises(ValueError, match="do not fit the config"):
        load_model(tmp_path)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    checkpoint.save_json_atomic(tmp_path / "a.json", {"é": [1, None]})
    assert files.load_json(tmp_path / "a.json") == {"é": [1, None]}
    with pytest.raises(TypeError):
        checkpoint.save_json_atomic(tmp_path / "a.json", {"x": np.ones(1)})
    assert os.listdir(tmp_path) == ["a.json"]
