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
from mpicomp.run.progress import Progress

TOML = """
data.kind = "digits"
topology.kind = "ring"
compression = { kind = "topk", ratio = 0.1 }
algorithm = { kind = "deep_squeeze", gamma = 1.5 }
optimizer = { kind = "sgd", lr = 0.1, momentum = 0.9 }
training = { epochs = 6, batch_size = 16 }
run.evaluate_every_epochs = 6.0
"""


def start(toml, folder=None, ranks=4, progress=None):
    return run(ranks, lambda world: train(RunConfig.from_toml(toml), world, folder, None if world.rank else progress))


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


def test_a_run_that_ends_before_it_is_clear_says_so(tmp_path, capsys):
    toml = TOML.replace("{ epochs = 6,", "{ steps = 60,") + "run.log_every = 60\nschedule.warmup = 0\n"
    start(toml, RunFolder.create(tmp_path), progress=Progress(60, None))
    assert "mpicomp: warning: training diverges: the loss is " in capsys.readouterr().out


@pytest.mark.parametrize(("lr", "is_useless"), [(1e-9, True), (0.1, False)])
def test_a_run_that_has_learned_nothing_says_so(tmp_path, capsys, lr, is_useless):
    toml = TOML.replace("lr = 0.1", f"lr = {lr}").replace("1.5", "0.3")
    start(toml, RunFolder.create(tmp_path), progress=Progress(None, 6))
    warning = "mpicomp: warning: nothing was learned: the loss is 2.3"
    assert (warning in capsys.readouterr().out) == is_useless


@pytest.mark.parametrize(
    ("loss", "accuracy", "is_useless"),
    [(2.4, 0.1, True), (2.4, None, True), (2.2, 0.1, False), (2.2, None, False), (2.4, 0.5, False)],
)
def test_a_loss_above_that_of_guessing_is_no_guess_if_answers_are_right(loss, accuracy, is_useless):
    """Few samples learned by heart: sure of itself, and often right."""
    assert load("digits").is_no_better_than_guessing(loss, accuracy) == is_useless


def test_other_losses_have_no_guess_to_compare_with():
    class Summed(Dataset):
        def loss(self, outputs, targets):
            return 1000 * super().loss(outputs, targets)

    digits = load("digits")
    assert digits.loss_of_guessing == pytest.approx(2.302585)
    fields = {name: getattr(digits, name) for name in ("kind", "task", "classes", "train", "test")}
    assert Summed(**fields).loss_of_guessing is None
    assert Dataset(**fields | {"task": "regression"}).loss_of_guessing is None
