"""Spectral quantities, connectedness, and what `check` refuses."""

import numpy as np
import pytest

from mpicomp import topology as topologies
from mpicomp.errors import TopologyError
from mpicomp.topology import Topology, best_diffusion_step, require_connected, spectral_gap

TWO_PAIRS = Topology("two_pairs", np.kron(np.eye(2), np.full((2, 2), 0.5)))
ONE_WAY = Topology("one_way", [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]])


def test_gap_counts_the_smallest_eigenvalue_too():
    two_sides = Topology("square", [[0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.5, 0, 0.5, 0]])
    assert spectral_gap(two_sides) == pytest.approx(0)
    assert two_sides.is_connected


def test_gap_of_a_row_stochastic_matrix_is_that_of_its_powers():
    mixing = topologies.star(5, weights="uniform").mixing
    rate = 1 - spectral_gap(Topology("star", mixing))
    apart = [np.ptp(np.linalg.matrix_power(mixing, power), axis=0).max() for power in (20, 21)]
    assert apart[1] / apart[0] == pytest.approx(rate, rel=1e-6)


def test_gap_of_a_directed_graph_is_its_singular_value():
    mixing = topologies.exponential(6).mixing
    assert spectral_gap(Topology("e", mixing)) == pytest.approx(1 - np.linalg.svd(mixing - 1 / 6, compute_uv=False)[0])


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
    assert topologies.exponential(8).is_connected
    assert not ONE_WAY.is_connected
    assert not TWO_PAIRS.is_connected
    assert topologies.ring(1).is_connected


def test_schedules_are_connected_by_their_union():
    require_connected(topologies.RandomMatching(5))
    require_connected(topologies.OnePeerExponential(5))


def test_ranks_that_are_not_connected_are_named():
    with pytest.raises(TopologyError, match=r"'two_pairs' is not connected: 2 of 4 ranks \(2, 3\) have no path"):
        require_connected(TWO_PAIRS)
