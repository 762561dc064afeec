"""Runs whose data set is not the same on all ranks, or no longer the one that they began with."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.config.config import RunConfig
from mpicomp.data import dataset
from mpicomp.data.dataset import Samples
from mpicomp.data.datasets import load
from mpicomp.errors import CheckpointError, DataError
from mpicomp.exchange.loopback import run
from mpicomp.run import setup
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

TOML = """
data = {{ kind = "text", path = '''{path}''', context = 16 }}
model = {{ kind = "gpt", width = 8, layers = 1, heads = 2 }}
optimizer.lr = 0.1
training = {{ steps = {steps}, batch_size = 4 }}
algorithm.kind = "{algorithm}"
"""
LINE = "To be, or not to be, that is the question.\n"


@pytest.mark.parametrize(
    ("algorithm", "old", "new"),
    [("dpsgd", "not to be", "to be not"), ("ad_psgd", "not to be", "to be not"), ("dpsgd", "question", "quest")],
)
def test_a_run_does_not_go_on_with_changed_texts(tmp_path, algorithm, old, new):
    text = tmp_path / "text.md"
    text.write_text(LINE * 200)
    folder = RunFolder.create(tmp_path / "run")

    def go_on(steps, checkpoint=None):
        setup._loaded.clear()  # a new program reads the texts again
        config = RunConfig.from_toml(TOML.format(path=tmp_path, steps=steps, algorithm=algorithm))
        return run(2, lambda world: train(config, world, folder, checkpoint=checkpoint))

    go_on(4)
    checkpoint = Checkpoints(folder.checkpoints_path).latest()
    text.write_text(LINE * 199 + LINE.replace(old, new) + "!")
    with pytest.raises(CheckpointError, match=r"data.kind = 'text', is not the one that this run began with"):
        go_on(8, checkpoint)
    text.write_text(LINE * 200)
    assert go_on(8, checkpoint)[0] is not None


def test_ranks_with_other_files_are_named():
    digits = load("digits", None)
    labels = digits.train.labels.clone()
    labels[0] += 1

    def check(world):
        other = replace(digits, train=Samples(digits.train.inputs, labels))
        dataset = other if world.rank == 1 else digits
        setup.check_same_data(SimpleNamespace(dataset=dataset, digest=dataset.digest()), world)

    with pytest.raises(DataError, match=r"the data set of rank 1 is another one than that of rank 0"):
        run(3, check)


def test_last_digits_of_floating_point_numbers_do_not_count():
    data = load("synthetic", None)
    nearly = replace(data, train=Samples(data.train.inputs * (1 + 1e-6), data.train.labels))
    assert not torch.equal(nearly.train.inputs, data.train.inputs)
    assert nearly.digest() == data.digest()


def test_every_token_of_a_text_counts(tmp_path):
    def digest(text):
        (tmp_path / "text.md").write_text(text)
        return load("text", tmp_path, context=16).digest()

    text = LINE * 3000
    assert digest(text) == digest(text)
    for place in (0, 18, 60_001, len(text) - 100):
        assert digest(text[:place] + "b" + text[place + 1 :]) != digest(text)


def test_of_large_data_every_so_many_samples_count(monkeypatch):
    digits = load("digits", None)
    monkeypatch.setattr(dataset, "DIGESTED", -(-digits.train.inputs.numel() // 3))

    def digest(changed):
        inputs = digits.train.inputs.clone()
        inputs[changed] += 1
        return replace(digits, train=Samples(inputs, digits.train.labels)).digest()

    assert digest(0) != digits.digest() != digest(3) and digest(1) == digits.digest()
