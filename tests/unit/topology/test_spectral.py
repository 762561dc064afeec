"""Spectral quantities, connectedness, and what `check` refuses."""

import numpy as np
import pytest

from mpicomp import topology as topologies
from mpicomp.errors import TopologyError
from mpicomp.topology import Topology, best_diffusion_step, beta, check, is_connected, spectral_gap

TWO_PAIRS = Topology("two_pairs", np.kron(np.eye(2), np.full((2, 2), 0.5)))
ONE_WAY = Topology("one_way", [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]])


def test_gap_counts_the_smallest_eigenvalue_too():
    two_sides = Topology("square", [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]])
    assert spectral_gap(two_sides) == pytest.approx(0)
    assert is_connected(two_sides)


def test_gap_of_a_row_stochastic_matrix_is_that_of_its_powers():
    mixing = topologies.star(5, weights="uniform").mixing
    rate = 1 - spectral_gap(Topology("star", mixing))
    apart = [np.ptp(np.linalg.matrix_power(mixing, power), axis=0).max() for power in (20, 21)]
    assert apart[1] / apart[0] == pytest.approx(rate, rel=1e-6)


def test_gap_of_a_directed_graph_is_its_singular_value():
    mixing = topologies.exponential(6).mixing
    assert spectral_gap(Topology("e", mixing)) == pytest.approx(1 - np.linalg.svd(mixing - 1 / 6, compute_uv=False)[0])


def test_beta():
    assert beta(topologies.complete(4)) == pytest.approx(1)
    assert beta(topologies.torus(16)) == pytest.approx(1.6)
    assert beta(topologies.ring(1)) == 0


@pytest.mark.parametrize(("kind", "size"), [("ring", 5), ("ring", 8), ("torus", 16), ("chain", 5), ("complete", 4)])
def test_best_diffusion_step_is_the_best(kind, size):
    graph = topologies.make_topology(kind, size)
    best = best_diffusion_step(graph)

    def rate(step):
        mixing = np.eye(size) + step * (graph.mixing - np.eye(size))
        return np.linalg.norm(mixing - 1 / size, ord=2)

    assert all(rate(best) <= rate(best + change) + 1e-12 for change in (-0.1, -0.01, 0.01, 0.1))


def test_best_diffusion_step_of_one_rank():
    assert best_diffusion_step(topologies.ring(1)) == 1


def test_best_diffusion_step_needs_symmetry_and_connection():
    with pytest.raises(TopologyError, match="'exponential' is not symmetric"):
        best_diffusion_step(topologies.exponential(8))
    with pytest.raises(TopologyError, match="'two_pairs' is not connected"):
        best_diffusion_step(TWO_PAIRS)


def test_connectedness_is_strong():
    assert is_connected(topologies.exponential(8))
    assert not is_connected(ONE_WAY)
    assert not is_connected(TWO_PAIRS)
    assert is_connected(topologies.ring(1))


def test_check_accepts_what_is_fine():
    check(topologies.ring(5), doubly_stochastic=True, symmetric=True)
    check(topologies.RandomMatching(5), doubly_stochastic=True, symmetric=True)
    check(topologies.OnePeerExponential(5), doubly_stochastic=True)
    check(TWO_PAIRS, connected=False)


def test_check_names_what_is_missing():
    with pytest.raises(TopologyError, match=r"'two_pairs' is not connected: 2 of 4 ranks \(2, 3\) have no path"):
        check(TWO_PAIRS)
    with pytest.raises(
        TopologyError, match=r"rank 0 weighs rank 1 with 0, the other way round it is 0.5; use an undir"
    ):
        check(topologies.OnePeerExponential(5), symmetric=True)
    with pytest.raises(
        TopologyError, match=r"'star' is not doubly stochastic: column 0 sums to 1.75 instead of 1; use"
    ):
        check(topologies.star(4, weights="uniform"), doubly_stochastic=True)
