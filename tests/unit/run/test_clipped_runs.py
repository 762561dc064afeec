"""Clipping in configured runs, and evaluation in batches that fit into memory."""

import math

import h5py
import numpy as np
import pytest
import torch

from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.run import evaluation
from mpicomp.run.evaluation import evaluate
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

TOML = """
data.kind = "synthetic"
model = { kind = "mlp", hidden = [8] }
optimizer = { kind = "sgd", lr = 0.5 }
training = { steps = 1, batch_size = 16 }
"""


def moved(path, ranks, algorithm, *changes):
    """How far one step of a run has moved the model."""
    topology = 'topology.kind = "star"' if algorithm == "asgd" else ""
    toml = "\n".join([TOML, topology, f'algorithm.kind = "{algorithm}"'])
    for old, new in changes:
        toml = toml.replace(old, new)
    config, folder = RunConfig.from_toml(toml), RunFolder.create(path)
    run(ranks, lambda world: train(config, world, folder))
    first = config.model.build(config.data.load(), config.run.seed).state_dict()
    with h5py.File(folder.model_path) as file:
        parts = [file[f"parameters/{name}"][()] - tensor.numpy() for name, tensor in first.items()]
    return math.sqrt(sum(float(np.square(part).sum()) for part in parts))


@pytest.mark.parametrize(("algorithm", "ranks"), [("sgd", 1), ("asgd", 2)])
def test_a_step_is_no_longer_than_the_clipped_gradient(tmp_path, algorithm, ranks):
    whole = moved(tmp_path / "whole", ranks, algorithm)
    unchanged = moved(tmp_path / "unchanged", ranks, algorithm, ("steps = 1", "steps = 1, clip_norm = 1e6"))
    clipped = moved(tmp_path / "clipped", ranks, algorithm, ("steps = 1", "steps = 1, clip_norm = 0.01"))
    assert whole > 0.01
    assert unchanged == whole
    assert clipped == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("value", ["0.0", "-1.0", "inf"])
def test_bad_limits_are_named(value):
    with pytest.raises(ConfigError, match=r"training\.clip_norm = .* must be"):
        RunConfig.from_toml(TOML.replace("steps = 1", f"steps = 1, clip_norm = {value}"))


def test_a_run_without_a_limit_is_written_as_before():
    assert "clip_norm" not in RunConfig.from_toml(TOML).to_toml()


def test_large_outputs_are_evaluated_in_small_batches(monkeypatch):
    config = RunConfig.from_toml(TOML)
    dataset = config.data.load()
    sizes = []

    def model(inputs):
        sizes.append(len(inputs))
        return torch.zeros(len(inputs), dataset.classes)

    model.eval = model.train = lambda: None
    whole = evaluate(model, dataset, torch.device("cpu"))
    assert sizes == [400]
    sizes.clear()
    monkeypatch.setattr(evaluation, "EVALUATION_NUMBERS", 30 * dataset.classes)
    parts = evaluate(model, dataset, torch.device("cpu"))
    assert sizes == [30] * 13 + [10]
    assert (parts.right, parts.total) == (whole.right, whole.total)
    assert parts.loss == pytest.approx(math.log(dataset.classes))
