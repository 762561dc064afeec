"""What a `Topology` refuses and how it reads."""

import numpy as np
import pytest

from mpicomp.errors import TopologyError
from mpicomp.topology import Topology


@pytest.mark.parametrize(
    ("mixing", "message"),
    [
        (np.ones((2, 3)), r"must be square, not \(2, 3\)"),
        (np.zeros((0, 0)), r"must be square, not \(0, 0\)"),
        ([[1.5, -0.5], [0, 1]], "finite and non-negative"),
        ([[np.nan, 0], [0, 1]], "finite and non-negative"),
        ([[0.5, 0.5], [0.5, 0.4]], "row 1 sums to 0.9 instead of 1"),
    ],
)
def test_bad_matrices_are_refused(mixing, message):
    with pytest.raises(TopologyError, match=message):
        Topology("bad", mixing)


@pytest.mark.parametrize(("dims", "periods"), [((3,), (True,)), ((2, 1), (True,)), ((2,), None)])
def test_a_grid_of_another_size_is_refused(dims, periods):
    with pytest.raises(TopologyError, match="are no grid of 2 ranks"):
        Topology("bad", np.eye(2), dims, periods)


def test_rows_listen_and_columns_send():
    graph = Topology("directed", [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]])
    assert graph.sources(0) == [1]
    assert graph.targets(1) == [0]
    assert graph.sources(2) == []
    assert graph.weight(0, 1) == 0.5
    assert graph.size == 3


def test_the_matrix_cannot_be_changed():
    source = np.eye(2)
    graph = Topology("identity", source)
    source[0, 0] = 7
    assert graph.weight(0, 0) == 1
    with pytest.raises(ValueError, match="read-only"):
        graph.mixing[0, 0] = 7


def test_it_is_its_own_schedule_and_can_be_a_key():
    graph = Topology("identity", np.eye(2))
    assert graph(0) is graph(17) is graph.union is graph
    assert graph == graph
    assert {graph: 1}[graph] == 1
