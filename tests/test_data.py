from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from npmamba.data import (
    IGNORE_INDEX,
    batch_at,
    batches,
    evaluation_windows,
    read_text,
    stdlib_corpus,
    train_val_split,
)
from npmamba.vocabulary import Vocabulary

SEEDS = st.integers(0, 2**64 - 1)
ANY_TEXT = st.text(st.characters(), max_size=50)  # lone surrogates too
PROPER_TEXT = st.text(max_size=50)


@given(ANY_TEXT.filter(bool), ANY_TEXT)
def test_decoding_undoes_encoding_by_characters(characters: str, more: str) -> None:
    vocabulary = Vocabulary(characters + more)
    ids = vocabulary.encode(more)
    assert (ids.dtype, ids.shape) == (np.int32, (len(more),))
    assert vocabulary.decode(ids) == more
    assert (
        vocabulary.decode(list(range(len(vocabulary))))
        == vocabulary.characters
        == "".join(sorted(set(characters + more)))
    )


@given(PROPER_TEXT)
def test_decoding_undoes_encoding_by_bytes(text: str) -> None:
    vocabulary = Vocabulary()
    assert (vocabulary.kind, len(vocabulary)) == ("byte", 256)
    assert vocabulary.encode(text).tolist() == list(text.encode())
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_bytes_cut_in_the_middle_of_a_character_are_shown_as_such() -> None:
    assert Vocabulary().decode([104, 0xC3]) == "h\N{REPLACEMENT CHARACTER}"


@given(ANY_TEXT.filter(bool), ANY_TEXT)
def test_a_character_has_one_id_wherever_it_stands(characters: str, text: str) -> None:
    vocabulary = Vocabulary(characters)
    known = "".join(c for c in text if c in set(characters))
    expected = [sorted(set(characters)).index(c) for c in known]
    assert vocabulary.encode(text, unknown="skip").tolist() == expected
    stand_in = vocabulary.encode(text, unknown=characters[0])
    assert vocabulary.decode(stand_in) == "".join(c if c in set(characters) else characters[0] for c in text)


@given(PROPER_TEXT)
def test_a_vocabulary_survives_its_file(characters: str) -> None:
    vocabulary = Vocabulary(characters or None)
    again = Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)
    assert eval(repr(again)) == vocabulary
    assert again != Vocabulary(characters + "\N{MOUSE}" if "\N{MOUSE}" not in characters else "x")


def test_a_vocabulary_is_saved_and_loaded(tmp_path: Path) -> None:
    for vocabulary in (Vocabulary("añ\n"), Vocabulary()):
        vocabulary.save(tmp_path / "vocabulary.json")
        assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    for content in ('{"kind": "word"}', '{"kind": "char"}', '{"kind": "char", "characters": ""}', "[]", "{"):
        (tmp_path / "vocabulary.json").write_text(content)
        with pytest.raises(ValueError, match="vocabulary.json"):
            Vocabulary.load(tmp_path / "vocabulary.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "abé",
            r"character 'é' \(U\+00E9\) at position 2 is not among the 3 known; the nearest known is 'e'",
        ),
        ("A", r"character 'A' \(U\+0041\) at position 0 .*; the nearest known is 'a'"),
        (
            "aa😀",
            r"character '😀' \(U\+1F600\) at position 2 is not among the 3 known\. Leave .*unknown='skip'",
        ),
        ("\N{LATIN SMALL LIGATURE FF}b", "character .* at position 0"),
    ],
)
def test_an_unknown_character_is_named_with_what_could_be_done(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="Vocabulary.encode: " + message):
        Vocabulary("abe").encode(text)
    with pytest.raises(ValueError, match="Vocabulary.encode"):
        Vocabulary("abe").encode(text, unknown="?")


@pytest.mark.parametrize(
    ("ids", "kind", "message"),
    [
        ([0, 3], ValueError, "id 3 is outside 0 to 2"),
        ([-1, 0], ValueError, "id -1 is outside"),
        ([0.0], TypeError, "ids must be integers, got float64"),
        ([True], TypeError, "ids must be integers, got bool"),
        ([[0]], ValueError, r"ids must have one axis, got shape \(1, 1\)"),
    ],
)
def test_ids_that_mean_nothing_are_refused(ids: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="Vocabulary.decode: " + message):
        Vocabulary("abe").decode(ids)


def test_no_characters_make_no_vocabulary() -> None:
    with pytest.raises(ValueError, match="characters is empty"):
        Vocabulary("")
    assert Vocabulary("ab").decode(np.int64(1)) == "b"
    assert Vocabulary("ab").decode([]) == Vocabulary("ab").decode(Vocabulary("ab").encode("")) == ""


@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_the_two_parts_are_the_whole(length: int, fraction: float) -> None:
    tokens = np.arange(length)
    assume(0 < int(length * fraction))
    train, val = train_val_split(tokens, fraction)
    assert np.array_equal(np.concatenate([train, val]), tokens)
    assert len(train) == int(length * fraction)
    assert min(len(train), len(val)) > 0


@given(st.integers(2, 200), st.integers(1, 9), SEEDS, SEEDS, st.data())
def test_a_batch_is_a_pure_function_of_seed_and_step(
    length: int, batch: int, seed: int, step: int, data: st.DataObject
) -> None:
    seqlen = data.draw(st.integers(1, length - 1))
    tokens = np.arange(length, dtype=np.int32)
    inputs, targets = batch_at(tokens, batch, seqlen, seed=seed, step=step)
    np.random.default_rng(0).random()
    again = batch_at(tokens, batch, seqlen, seed=seed, step=step)
    assert np.array_equal(inputs, again[0])
    assert np.array_equal(targets, again[1])
    assert inputs.shape == targets.shape == (batch, seqlen)
    assert inputs.dtype == tokens.dtype
    assert np.array_equal(targets, inputs + 1)  # the tokens are their places, so the target is the next one
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(seqlen))
    assert inputs.min() >= 0
    assert targets.max() <= length - 1


def test_batches_of_other_seeds_and_steps_differ() -> None:
    tokens = np.arange(10**6)
    starts = {tuple(batch_at(tokens, 4, 1, seed=seed, step=step)[0].ravel()) for seed in range(5) for step in range(5)}
    assert len(starts) == 25


def test_every_place_is_drawn_the_last_one_too() -> None:
    inputs, targets = batch_at(np.arange(5), 500, 2, seed=0, step=0)
    assert set(inputs[:, 0]) == {0, 1, 2}
    assert set(targets[:, -1]) == {2, 3, 4}


def test_the_stream_of_batches_can_start_anywhere() -> None:
    tokens = np.arange(50)
    stream = batches(tokens, 2, 3, seed=9)
    steps = [next(stream) for _ in range(4)]
    resumed = batches(tokens, 2, 3, seed=9, start=2)
    for expected, found in zip(steps[2:], resumed, strict=False):
        assert np.array_equal(expected, found)


@given(st.integers(2, 200), st.integers(1, 250))
def test_every_token_but_the_first_is_predicted_exactly_once_in_order(length: int, seqlen: int) -> None:
    tokens = np.arange(length, dtype=np.int32)
    inputs, targets = evaluation_windows(tokens, seqlen)
    assert inputs.shape == targets.shape
    assert inputs.shape[1] == seqlen
    predicted = targets != IGNORE_INDEX
    assert np.array_equal(targets[predicted], tokens[1:])
    assert np.array_equal(inputs[predicted], tokens[:-1])
    assert predicted.any(axis=1).all(), "no window is all padding"
    assert (inputs[~predicted] == 0).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: batch_at(np.arange(8), 1, 8, seed=0, step=0), ValueError,
         "batch_at: seqlen=8 needs 9 tokens, .*but there are 8; use a shorter context"),
        (lambda: batch_at(np.arange(8), 0, 3, seed=0, step=0), ValueError, "batch=0; expected at least 1"),
        (lambda: batch_at(np.arange(8), 1, 3.0, seed=0, step=0), TypeError, "seqlen must be an integer"),
        (lambda: batch_at(np.arange(8), 1, 3, seed=-1, step=0), ValueError, "seed=-1; expected at least 0"),
        (lambda: batch_at(np.arange(8), 1, 3, seed=0, step=2**64), ValueError, "step=18446744073709551616"),
        (lambda: batch_at(np.arange(8.0), 1, 3, seed=0, step=0), TypeError, "array of integers, got float64"),
        (lambda: batch_at([1, 2, 3], 1, 1, seed=0, step=0), TypeError, "array of integers, got list"),
        (lambda: batch_at(np.ones((2, 9), int), 1, 1, seed=0, step=0), ValueError, r"got shape \(2, 9\)"),
        (lambda: evaluation_windows(np.arange(1), 4), ValueError, "got 1 tokens; expected at least 2"),
        (lambda: evaluation_windows(np.arange(9), 0), ValueError, "seqlen=0"),
        (lambda: train_val_split(np.arange(1)), ValueError, "1 tokens leave one part empty"),
        (lambda: train_val_split(np.arange(9), 1.0), ValueError, "fraction=1.0; expected a number between"),
        (lambda: train_val_split(np.arange(9), float("nan")), ValueError, "fraction=nan"),
    ],
)  # fmt: skip
def test_windows_that_cannot_be_cut_are_refused(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_folder_is_read_in_the_order_of_names_whatever_the_disk_says(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "2", "a/z.py": "1", "a.txt": "0\r\n", "c/d/e.md": "3", ".hidden/x.txt": "no", ".x.txt": "no",
        "c/table.csv": "no",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read_text(tmp_path) == "10\r\n23"
    assert read_text(tmp_path, (".csv",)) == "no"
    (tmp_path / "any.name").write_bytes(b"\xef\xbb\xbfa\xc3\xa9")
    assert read_text(str(tmp_path / "any.name")) == "aé"


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="read_text: .*absent does not exist"):
        read_text(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no file that ends in .txt, .md, .py"):
        read_text(tmp_path)
    for content, message in [
        (b"", "x.txt is empty"),
        (b"ab\xff", "x.txt is not UTF-8 text: invalid start byte at byte 2"),
        (b"ab\0c", "x.txt is not text: it has a NUL character at position 2"),
    ]:
        (tmp_path / "x.txt").write_bytes(content)
        for path in (tmp_path, tmp_path / "x.txt"):
            with pytest.raises(ValueError, match=message.replace("x.txt is empty", "is empty")):
                read_text(path)


def test_the_standard_library_is_the_same_text_every_time() -> None:
    text = stdlib_corpus(300_000)
    assert text == stdlib_corpus(300_000)
    assert len(text) == 300_000
    assert stdlib_corpus(1000) == text[:1000]
    first = Path(os.__file__).parent / "__future__.py"
    assert text.startswith(first.read_text(encoding="utf-8"))
    assert sys.prefix not in text


def test_a_python_without_sources_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="has no Python source"):
        stdlib_corpus()
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "test").mkdir()
    for name in ("site-packages/a.py", "test/b.py", "_sysconfigdata_x.py", "b.txt"):
        (tmp_path / name).write_text("no")
    (tmp_path / "latin.py").write_bytes(b"\xff")
    (tmp_path / "a.py").write_text("yes")
    assert stdlib_corpus() == "yes"
