"""The rules for weights on regular, irregular and directed graphs."""

import numpy as np
import pytest

from mpicomp import topology as topologies
from mpicomp.errors import TopologyError
from mpicomp.topology import spectral_gap
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.weights import mixing_matrix


@pytest.mark.parametrize("kind", ["ring", "torus", "hypercube", "exponential", "complete"])
def test_both_rules_agree_on_regular_graphs(kind):
    metropolis, uniform = (topologies.make_topology(kind, 8, weights=rule) for rule in ("metropolis", "uniform"))
    np.testing.assert_allclose(metropolis.mixing, uniform.mixing, atol=1e-15)


def test_uniform_on_an_irregular_graph_is_row_stochastic_only():
    graph = topologies.star(4, weights="uniform")
    np.testing.assert_allclose(graph.mixing, [[1 / 4] * 4, *[[0.5, *row] for row in np.eye(3) / 2]])
    assert not graph.is_doubly_stochastic
    assert topologies.star(4).is_doubly_stochastic


def test_uniform_limit_is_weighted_by_degree():
    power = np.linalg.matrix_power(topologies.star(4, weights="uniform").mixing, 200)
    np.testing.assert_allclose(power, [[0.4, 0.2, 0.2, 0.2]] * 4, atol=1e-12)


def test_push_gives_equal_shares_to_all_that_a_rank_sends_to():
    adjacency = SparseMatrix.from_dense([[0, 1, 1], [1, 0, 0], [0, 1, 0]])
    expected = np.array([[3, 2, 3], [3, 2, 0], [0, 2, 3]]) / 6
    np.testing.assert_allclose(mixing_matrix(adjacency, "push", lazy=False).to_dense(), expected)
    graph = topologies.Topology("push", mixing_matrix(adjacency, "push", lazy=True))
    np.testing.assert_allclose(graph.mixing, (np.eye(3) + expected) / 2)
    assert graph.is_column_stochastic and not graph.is_doubly_stochastic


def test_lazy_halves_the_matrix_towards_the_identity():
    ring, lazy = topologies.ring(6), topologies.ring(6, lazy=True)
    np.testing.assert_allclose(lazy.mixing, (np.eye(6) + ring.mixing) / 2)
    assert np.linalg.eigvalsh(lazy.mixing).min() > -1e-12
    assert lazy.dims == ring.dims
    assert spectral_gap(lazy) == pytest.approx(spectral_gap(ring) / 2)


def test_metropolis_is_refused_on_an_irregular_directed_graph():
    adjacency = SparseMatrix.from_dense([[0, 1, 1], [1, 0, 0], [0, 1, 0]])
    with pytest.raises(TopologyError, match=r"topology.weights = 'metropolis' is for undirected graphs"):
        mixing_matrix(adjacency, "metropolis", lazy=False)
    np.testing.assert_allclose(mixing_matrix(adjacency, "uniform", lazy=False).row_sums, 1)
