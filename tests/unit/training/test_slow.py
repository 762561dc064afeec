"""Ranks that are slow on purpose."""

import pytest

from mpicomp.training import slow
from mpicomp.training.sections import SlowSection
from mpicomp.training.slow import Slowness


@pytest.fixture
def slept(monkeypatch):
    """The seconds of every sleep, which takes none."""
    seconds = []
    monkeypatch.setattr(slow.time, "sleep", seconds.append)
    return seconds


def test_no_rank_is_slow_unless_asked(slept):
    Slowness().sleep(1.0)
    assert slept == []


def test_factor_and_seconds_add_up(slept):
    Slowness(factor=4.0, seconds=0.5).sleep(0.2)
    assert slept == pytest.approx([1.1])


def test_an_exponential_spread_has_that_mean_and_can_be_repeated(slept):
    for _ in range(2):
        slowness = Slowness(seconds=0.5, spread="exponential", seed=3, rank=1)
        for _ in range(4000):
            slowness.sleep(0.0)
    assert sum(slept) / len(slept) == pytest.approx(0.5, rel=0.1)
    assert slept[:4000] == slept[4000:]


def test_only_the_chosen_ranks_are_slow(slept):
    section = SlowSection(ranks=[1], seconds=0.25)
    for rank in range(3):
        section.build(rank, seed=0).sleep(0.1)
    assert slept == [0.25]
