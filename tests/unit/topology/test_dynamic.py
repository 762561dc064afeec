"""Schedules: who meets whom at each step, and what a period does."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.errors import TopologyError
from mpicomp.topology import OnePeerExponential, RandomMatching, period_product, spectral_gap

sizes = st.integers(1, 40)
steps = st.integers(0, 2**63)
seeds = st.integers(0, 2**63)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 64])
def test_one_peer_exponential_reaches_the_mean_exactly(size):
    schedule = OnePeerExponential(size)
    product = reduce(np.matmul, [schedule(step).mixing for step in range(schedule.period)])
    np.testing.assert_array_equal(product, np.full((size, size), 1 / size))
    assert spectral_gap(schedule) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 12])
def test_one_peer_exponential_mixes_at_any_size(size):
    schedule = OnePeerExponential(size)
    assert schedule.period == int(np.ceil(np.log2(size)))
    assert period_product(schedule).is_doubly_stochastic
    assert 0 < spectral_gap(schedule) < 1


def test_one_peer_exponential_sends_ahead():
    schedule = OnePeerExponential(5)
    assert [schedule(step).targets(0) for step in range(4)] == [[1], [2], [4], [1]]
    assert [schedule(step).sources(0) for step in range(4)] == [[4], [3], [1], [4]]
    assert schedule(0).weight(0, 4) == schedule(0).weight(0, 0) == 0.5


def test_one_peer_exponential_keeps_the_graphs_of_a_period():
    schedule = OnePeerExponential(8)
    assert schedule(1) is schedule(4)


@settings(deadline=None)
@given(sizes, seeds, steps)
def test_random_matching_pairs_everyone_but_one(size, seed, step):
    graph = RandomMatching(size, seed)(step)
    assert graph.is_symmetric
    assert graph.is_doubly_stochastic
    partners = [graph.sources(rank) for rank in range(size)]
    assert partners.count([]) == size % 2
    assert all(len(partner) <= 1 for partner in partners)
    assert all(graph.weight(rank, partner[0]) == 0.5 for rank, partner in enumerate(partners) if partner)
    np.testing.assert_array_equal(graph.mixing @ graph.mixing, graph.mixing)


@settings(deadline=None)
@given(sizes, seeds, steps)
def test_random_matching_is_the_same_for_every_rank(size, seed, step):
    here, there = RandomMatching(size, seed), RandomMatching(size, seed)
    before = here(step).mixing
    for other in range(3):
        there(other)
    np.testing.assert_array_equal(there(step).mixing, before)


def test_random_matching_is_the_same_on_every_machine():
    schedule = RandomMatching(6, seed=1)
    partners = [[schedule(step).sources(rank)[0] for rank in range(6)] for step in range(2)]
    assert partners == [[5, 4, 3, 2, 1, 0], [3, 4, 5, 0, 1, 2]]


def test_random_matching_changes_with_step_and_seed():
    graphs = [RandomMatching(16, seed)(step).mixing for seed in range(2) for step in range(10)]
    assert len({graph.tobytes() for graph in graphs}) == len(graphs)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_random_matching_has_the_stated_mean(size):
    schedule = RandomMatching(size, seed=7)
    draws = 4000
    average = sum(schedule(step).mixing for step in range(draws)) / draws
    # The entries are 0, 1/2 or 1, so the standard error of an average is at most 1/4 over the root.
    np.testing.assert_allclose(average, schedule.mean.mixing, atol=5 / (4 * draws**0.5))
    second = 0.5 if size % 2 else 1 - size / (2 * (size - 1))
    assert spectral_gap(schedule.mean) == pytest.approx(1 - second)


@pytest.mark.parametrize("size", [4, 5, 6, 9, 16])
def test_random_matching_draws_all_pairs_alike(size):
    """The chi-squared statistic of how often each pair occurs, and each rest, is near its mean."""
    draws = 4000
    counts = np.zeros((size, size))
    for step in range(draws):
        graph = RandomMatching(size, seed=11)(step)
        for rank in range(size):
            counts[rank, (graph.sources(rank) or [rank])[0]] += 1
    found = counts[np.triu_indices(size, 0 if size % 2 else 1)]
    expected = draws / (size if size % 2 else size - 1)
    # Each pair is a success with this probability in each draw; pairs that exclude each other lower the variance.
    variance = expected * (1 - expected / draws)
    assert ((found - expected) ** 2 / variance).mean() < 1 + 5 * (2 / len(found)) ** 0.5


def test_a_single_rank_rests():
    assert RandomMatching(1)(3).mixing.tolist() == [[1.0]]
    assert RandomMatching(1).mean.mixing.tolist() == [[1.0]]


@pytest.mark.parametrize("schedule", [OnePeerExponential, RandomMatching])
def test_impossible_sizes_are_refused(schedule):
    with pytest.raises(TopologyError, match=f"topology.kind = '{schedule.name}' needs a whole number of ranks"):
        schedule(0)


def test_a_negative_seed_is_refused():
    with pytest.raises(TopologyError, match=r"topology.seed = -1 must be a whole number of at least 0"):
        RandomMatching(4, seed=-1)
