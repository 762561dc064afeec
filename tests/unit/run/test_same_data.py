"""Runs whose data set is not the same on all ranks, or no longer the one that they began with."""

from dataclasses import replace

import pytest
import torch

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.config.config import RunConfig
from mpicomp.data.datasets import Samples, load
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


@pytest.mark.parametrize("algorithm", ["dpsgd", "ad_psgd"])
def test_a_run_does_not_go_on_with_changed_texts(tmp_path, algorithm):
    text = tmp_path / "text.md"
    text.write_text(LINE * 200)
    folder = RunFolder.create(tmp_path / "run")

    def go_on(steps, checkpoint=None):
        setup._loaded.clear()  # a new program reads the texts again
        config = RunConfig.from_toml(TOML.format(path=tmp_path, steps=steps, algorithm=algorithm))
        return run(2, lambda world: train(config, world, folder, checkpoint=checkpoint))

    go_on(4)
    checkpoint = Checkpoints(folder.checkpoints_path).latest()
    text.write_text(LINE.replace("not to be", "to be not") * 200)
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
        setup.check_same_data(other if world.rank == 1 else digits, world)

    with pytest.raises(DataError, match=r"the files of rank 1 hold other samples than those of rank 0"):
        run(3, check)


def test_last_digits_of_floating_point_numbers_do_not_count():
    data = load("synthetic", None)
    nearly = replace(data, train=Samples(data.train.inputs * (1 + 1e-6), data.train.labels))
    assert not torch.equal(nearly.train.inputs, data.train.inputs)
    assert nearly.digest == data.digest
