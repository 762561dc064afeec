"""A run whose loss stays far above that of guessing ends with an error; neither NaN nor infinity need be in it."""

import math

import pytest

from mpicomp.config.config import RunConfig
from mpicomp.data.dataset import Dataset
from mpicomp.data.datasets import load
from mpicomp.errors import DivergenceError
from mpicomp.exchange.loopback import run
from mpicomp.run.context import DIVERGED_RECORDS
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

TOML = """
data.kind = "digits"
topology.kind = "ring"
compression = { kind = "topk", ratio = 0.1 }
algorithm = { kind = "deep_squeeze", gamma = 1.5 }
optimizer = { kind = "sgd", lr = 0.1, momentum = 0.9 }
training = { epochs = 6, batch_size = 16 }
run.evaluate_every_epochs = 6.0
"""


def start(toml, folder=None, ranks=4):
    return run(ranks, lambda world: train(RunConfig.from_toml(toml), world, folder))


def test_a_consensus_step_that_is_too_large_ends_the_run(tmp_path):
    folder = RunFolder.create(tmp_path)
    message = r"training diverges: at step \d+ the loss is .*, and guessing has 2.3. Lower .* \(on all ranks\)"
    with pytest.raises(DivergenceError, match=message):
        start(TOML, folder)
    losses = [record["loss"] for record in folder.records()]
    assert min(losses[-DIVERGED_RECORDS:]) > 10 * math.log(10) > losses[-DIVERGED_RECORDS - 1]


def test_the_step_that_finds_itself_does_not():
    (result, *_) = start(TOML.replace("gamma = 1.5", 'gamma = "auto"'))
    assert result.test_accuracy > 0.9


def test_other_losses_have_no_guess_to_compare_with():
    class Summed(Dataset):
        def loss(self, outputs, targets):
            return 1000 * super().loss(outputs, targets)

    digits = load("digits")
    assert digits.loss_of_guessing == pytest.approx(2.302585)
    fields = {name: getattr(digits, name) for name in ("kind", "task", "classes", "train", "test")}
    assert Summed(**fields).loss_of_guessing is None
    assert Dataset(**fields | {"task": "regression"}).loss_of_guessing is None
