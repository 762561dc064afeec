"""Graphs that have lost ranks."""

import numpy as np
import pytest

from mpicomp.errors import TopologyError
from mpicomp.topology import Topology, complete, induced, ring, star


def test_a_ring_that_loses_a_rank_is_a_chain_with_its_weights():
    left = induced(ring(4), [0, 1, 3])
    assert np.allclose(left.mixing, np.array([[1, 1, 1], [1, 2, 0], [1, 0, 2]]) / 3)
    assert left.is_symmetric and left.is_doubly_stochastic
    assert [left.sources(rank) for rank in range(3)] == [[1, 2], [0], [0]]
    assert left.is_connected
    assert left.name == "ring, 3 of 4 ranks"


def test_nothing_is_lost_where_no_rank_is():
    assert np.allclose(induced(complete(5), range(5)).mixing, complete(5).mixing)


@pytest.mark.parametrize("ranks", [[0, 2], [1, 2, 3]])
def test_a_graph_that_falls_apart_is_no_longer_connected(ranks):
    graph = ring(4) if len(ranks) == 2 else star(4)
    assert not induced(graph, ranks).is_connected


def test_one_rank_keeps_its_own_model():
    assert induced(ring(4), [2]).mixing.tolist() == [[1.0]]


def test_a_directed_graph_with_unequal_degrees_is_refused():
    mixing = np.eye(3)
    mixing[0] = 1 / 3
    with pytest.raises(TopologyError, match="undirected"):
        induced(Topology("to rank 0", mixing), [0, 1, 2])
