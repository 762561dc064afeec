"""Every file of configs/ is sound, and the methods learn."""

import math
from pathlib import Path

import pytest

from mpicomp.algorithms import ALGORITHMS
from mpicomp.config.config import RunConfig
from mpicomp.exchange.loopback import run
from mpicomp.run.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.toml") if path.name != "study.toml")
METHODS = sorted((CONFIGS / "methods").glob("*.toml"))


def ranks(config, wished):
    """How many ranks a file is meant for."""
    return {"sgd": 1, "sgp": 4}.get(config.algorithm.kind, wished)  # two ranks have no digraph to speak of


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_it_is_sound(path):
    config = RunConfig.load(path)
    size = ranks(config, 4)
    schedule, algorithm = config.check(size)
    assert schedule.size == size
    assert isinstance(algorithm, ALGORITHMS[config.algorithm.kind])


def test_every_algorithm_has_a_file():
    """A file is named after its algorithm, or after a variant: ``gmc_plus``."""
    kinds = {path.stem: RunConfig.load(path).algorithm.kind for path in METHODS}
    assert set(kinds.values()) == set(ALGORITHMS)
    assert all(stem.startswith(kind) for stem, kind in kinds.items())


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_it_begins_to_learn(path):
    config = RunConfig.load(path, ["training.steps=40", "run.evaluate_every_epochs=100", "schedule.warmup=0"])
    (result, *others) = run(ranks(config, 2), lambda world: train(config, world, None, None))
    assert all(other == result for other in others)
    assert result.steps == 40
    assert math.isfinite(result.consensus_distance)
    assert result.test_accuracy > 0.5


@pytest.mark.parametrize("kind", ["efficient_adam", "onebit_adam", "powersgd"])
def test_the_server_of_a_star_has_numbers_of_its_own(kind):
    overrides = ["topology.kind=star", "training.steps=40", "schedule.warmup=0"]
    config = RunConfig.load(CONFIGS / "methods" / f"{kind}.toml", overrides)
    (result, *others) = run(3, lambda world: train(config, world, None, None))
    assert all(other == result for other in others)
    assert result.test_accuracy > 0.5
