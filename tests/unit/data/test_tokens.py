"""Tokens of byte-level byte-pair encoding: what they say, where they lie, and several processes at once."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from mpicomp.data import tokens
from mpicomp.data.datasets import load
from mpicomp.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog,",
    "and",
    "42",
    "naïve",
    "cats",
    "run",
    "away",
    "🐱",
    "home\n",
]


def prose(seed, count=2000):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text(prose(1))
    (tmp_path / "sub" / "a.md").write_text(prose(2))
    (tmp_path / "c.py").write_text("not a text")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("not seen")
    return tmp_path


def bpe(folder, **params):
    return load("text", folder, **{"tokenizer": "bpe", "vocabulary": 300, "context": 16, **params})


def stored(folder):
    (made,) = [path for path in (folder / ".mpicomp").iterdir() if path.is_dir()]
    return made


def test_tokens_decode_to_the_texts(folder):
    data = bpe(folder)
    assert (data.task, data.input_shape, data.classes) == ("language", (16,), 300)
    tokenizer = tokenizers.Tokenizer.from_file(str(stored(folder) / "tokenizer.json"))
    end = tokenizer.token_to_id(tokens.END_OF_TEXT)
    inputs, targets = data.batch("train", np.arange(len(data.train)))
    assert (inputs.dtype, inputs.shape[1], targets.shape) == (torch.int64, 16, inputs.shape)
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
    all_tokens = [np.load(stored(folder) / f"{part}.npy") for part in ("train", "test")]
    assert np.array_equal(all_tokens[0][: inputs.numel()], inputs.flatten())
    whole = prose(1) + prose(2)
    assert "".join(tokenizer.decode(part) for part in all_tokens) == whole
    assert tokenizer.decode(all_tokens[0]) == whole[: len(whole) - len(whole) // 10]
    assert [int((part == end).sum()) for part in all_tokens] == [2, 1]
    assert sum(map(len, all_tokens)) < len(whole) / 2  # pairs were joined


def test_long_texts_are_encoded_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(tokens, "PIECE", 50)
    assert "".join(tokens._pieces(prose(1))) == prose(1)
    bpe(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(stored(folder) / "tokenizer.json"))
    parts = [tokenizer.decode(np.load(stored(folder) / f"{part}.npy")) for part in ("train", "test")]
    assert "".join(parts) == prose(1) + prose(2)


def test_the_tokenizer_does_not_see_the_test_part(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 900 + "xyz" * 100)
    bpe(tmp_path)
    joined = json.loads((stored(tmp_path) / "tokenizer.json").read_text())["model"]["merges"]
    assert joined and not any("x" in "".join(pair) for pair in joined)


def test_windows_are_views_of_the_file_and_never_change_it(folder):
    data = bpe(folder)
    path = stored(folder) / "train.npy"
    before = path.read_bytes()
    assert data.train.inputs.dtype == torch.int16
    assert data.train.inputs.untyped_storage().nbytes() == 2 * len(np.load(path))
    assert data.train.inputs.stride() == (16, 1)
    data.train.inputs[0, 0] += 1
    assert path.read_bytes() == before


def test_large_vocabularies_have_wider_tokens(folder, monkeypatch):
    monkeypatch.setattr(tokens, "vocabulary_size", lambda content: 2**15 + 1)
    assert bpe(folder).train.inputs.dtype == torch.int32


def test_a_short_text_has_a_smaller_vocabulary(folder):
    assert tokens.LEAST_VOCABULARY < bpe(folder, vocabulary=4096).classes < 400


def test_a_second_start_reads_what_the_first_has_made(folder, monkeypatch):
    first = bpe(folder)
    monkeypatch.setattr(tokens, "_make", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # not needed any more
    again = bpe(folder, context=16)
    assert torch.equal(first.train.inputs, again.train.inputs)
    assert bpe(folder, context=5).input_shape == (5,)


def test_a_changed_file_or_vocabulary_has_other_tokens(folder):
    first = bpe(folder).train.inputs.clone()
    bpe(folder, vocabulary=290)
    (folder / "b.txt").write_text(prose(1).replace("fox", "cat"))
    changed = bpe(folder).train.inputs
    assert first.shape != changed.shape or not torch.equal(first, changed)
    assert sum(path.is_dir() for path in (folder / ".mpicomp").iterdir()) == 3


def test_nodes_without_a_common_file_system_make_the_same_tokens(folder, tmp_path):
    for name in ("one", "two"):
        bpe(folder, cache=tmp_path / name)
    files = [sorted(path for path in (tmp_path / name).rglob("*.*")) for name in ("one", "two")]
    assert [path.name for path in files[0]] == ["test.npy", "tokenizer.json", "train.npy"]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_the_cache_may_lie_elsewhere(folder, tmp_path):
    bpe(folder, cache=tmp_path / "deep" / "cache")
    assert not (folder / ".mpicomp").exists()
    assert any(path.is_dir() for path in (tmp_path / "deep" / "cache").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache: tokens cannot be written to .*Set data\.cache"):
        bpe(folder, cache=tmp_path / "file")


PROGRAM = """
import sys, time
from pathlib import Path
from mpicomp.data import tokens
from mpicomp.data.datasets import load

def count(*arguments, make=tokens._make):
    print("made", flush=True)
    make(*arguments)

tokens._make = count
if sys.argv[2] == "no locks":
    def refuse(*_):
        raise OSError("no locks here")
    tokens.fcntl.flock = refuse
print("ready", flush=True)
sys.stdin.readline()
data = load("text", Path(sys.argv[1]), tokenizer="bpe", vocabulary=300, context=16)
print(data.classes, int(data.train.inputs.long().sum()), int(data.test.inputs.long().sum()))
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_processes_at_once_get_the_same_tokens(folder, locks):
    """With locks one process does the work; without, all of them may, and get the same."""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), locks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert outputs[0][-1] == outputs[1][-1]
    made = sum(output.count("made") for output in outputs)
    assert made == 1 if locks == "locks" else made in (1, 2)
    assert sorted(path.name for path in (folder / ".mpicomp").iterdir()) == sorted([stored(folder).name, "lock"])


def test_a_slower_process_takes_what_the_faster_has_made(folder, monkeypatch):
    first = bpe(folder)
    target = stored(folder)
    tokens._make(target, [prose(1), prose(2)], 300, None)  # as a process without locks that began before
    assert sorted(path.name for path in (folder / ".mpicomp").iterdir()) == sorted([target.name, "lock"])
    assert torch.equal(first.train.inputs, bpe(folder).train.inputs)


def test_a_tokenizer_that_exists_takes_the_place_of_a_new_one(folder, tmp_path):
    first = bpe(folder)
    path = tmp_path / "given.json"
    path.write_text(first.tokenizer)
    assert torch.equal(bpe(folder, tokenizer=str(path)).train.inputs, first.train.inputs)
    assert sum(entry.is_dir() for entry in (folder / ".mpicomp").iterdir()) == 1  # nothing was encoded again
    (folder / "b.txt").write_text(prose(3))
    other = bpe(folder, tokenizer=str(path))
    assert (other.tokenizer, other.classes) == (first.tokenizer, first.classes)
    decoded = tokenizers.Tokenizer.from_file(str(path)).decode(other.train.inputs[0].tolist())
    assert prose(3).startswith(decoded)


def test_a_tokenizer_of_characters_has_the_numbers_of_its_text(folder, tmp_path):
    path = tmp_path / "given.json"
    first = load("text", folder, context=16)
    path.write_text(first.tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(prose(1)[::2])
    known = json.loads(first.tokenizer)["characters"]
    data = load("text", text, tokenizer=str(path), context=16)
    assert data.classes == first.classes == len(known)
    assert "".join(known[i] for i in data.train.inputs[0]) == text.read_text()[:17]
    text.write_text("§" + prose(1))
    with pytest.raises(DataError, match=r"text\.txt has the character '§', which it lacks"):
        load("text", text, tokenizer=str(path), context=16)
    path.write_text('{"model": 1}')
    with pytest.raises(ConfigError, match=r"given\.json' is no tokenizer\.json"):
        load("text", folder, tokenizer=str(path), context=16)


def test_files_are_chosen_by_name_and_pattern(folder):
    def characters(file, path=folder):
        data = load("text", path, file=file, context=16)
        return len(data.train) + len(data.test)

    whole = load("text", folder, context=16)
    assert whole.classes == len(set(prose(1) + prose(2)))
    one, other = characters("b.txt"), characters(("sub/*.md",))
    assert one == characters((), folder / "b.txt") and abs(characters(("b.txt", "**/*.md")) - one - other) <= 2
    assert abs(len(whole.train) + len(whole.test) - one - other) <= 2
    with pytest.raises(DataError, match=r"needs \*\.rst, and there is no such file in .*Set data\.path"):
        characters("*.rst")
    with pytest.raises(ConfigError, match=r"data\.file = '/x/\*' is no name or pattern"):
        characters("/x/*")


def test_what_cannot_be_used_is_named(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.vocabulary = 256: must be at least 257"):
        bpe(folder, vocabulary=256)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'words' must be 'characters', 'bpe', or the path of"):
        bpe(folder, tokenizer="words")
    with pytest.raises(DataError, match=r"data\.context = 5000: the text .* a window of 5001 at least"):
        bpe(folder, context=5000)
    (stored(folder) / "test.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.cache: the folder .* is damaged .*Remove it"):
        bpe(folder)
    (folder / "b.txt").write_bytes(b"\xff\xfe\xfa" * 100)
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text"):
        bpe(folder)
    (folder / "b.txt").write_text("another text")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'bpe' needs .* pip install tokenizers"):
        bpe(folder)
