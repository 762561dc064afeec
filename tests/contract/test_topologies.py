"""What holds for every topology of the registry, at every size where it exists."""

import math

import numpy as np
import pytest

from mpicomp.errors import TopologyError
from mpicomp.topology import TOPOLOGIES, Topology, make_topology, require_connected, spectral_gap

SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 32)
DIRECTED = {"directed_ring", "exponential", "one_peer_exponential", "random_digraph"}
PUSH = {"random_digraph"}  # by default only the columns of the weights sum to one
SCHEDULES = {"one_peer_exponential", "random_matching"}
GRIDS = {"ring", "chain", "torus", "hypercube"}

exists = {
    "complete_bipartite": lambda size: size != 2,
    "dyck": lambda size: size == 32,
    "random_digraph": lambda size: size != 2,
    "hypercube": lambda size: size & (size - 1) == 0,
    "random_regular": lambda size: size > 4,
}
CASES = [(kind, size) for kind in sorted(TOPOLOGIES) for size in SIZES if exists.get(kind, bool)(size)]
every = pytest.mark.parametrize(("kind", "size"), CASES)


@pytest.fixture
def build(tmp_path):
    def build(kind, size, **parameters):
        if kind == "file":
            # A cycle with a tail, as far as there are ranks for it.
            edges = [(rank, rank + 1) for rank in range(size - 1)] + [(0, 2)] * (size > 2)
            parameters["path"] = tmp_path / "graph.json"
            nodes = ", ".join(f'{{"id": {rank}}}' for rank in range(size))
            lines = ", ".join(f'{{"source": {u}, "target": {v}}}' for u, v in edges)
            parameters["path"].write_text(f'{{"nodes": [{nodes}], "edges": [{lines}]}}')
        return make_topology(kind, size, **parameters)

    return build


def graphs(schedule):
    """Return the graphs of the first steps."""
    return [schedule] if isinstance(schedule, Topology) else [schedule(step) for step in range(6)]


@every
def test_weights(build, kind, size):
    schedule = build(kind, size)
    assert schedule.size == size
    for graph in graphs(schedule):
        assert graph.size == size
        assert graph.mixing.dtype == np.float64
        np.testing.assert_allclose(graph.mixing.sum(axis=0 if kind in PUSH else 1), 1, rtol=0, atol=1e-12)
        assert (np.diag(graph.mixing) > 0).all()
        assert graph.is_column_stochastic
        assert graph.is_doubly_stochastic or kind in PUSH
        assert graph.is_symmetric or kind in DIRECTED
        assert np.array_equal(graph.mixing, graph.mixing.T) == graph.is_symmetric


@every
def test_sources_and_targets_are_two_sides_of_the_same_edges(build, kind, size):
    schedule = build(kind, size)
    for graph in graphs(schedule):
        for rank in range(size):
            assert graph.sources(rank) == sorted(set(graph.sources(rank)) - {rank})
            assert graph.targets(rank) == sorted(set(graph.targets(rank)) - {rank})
            assert all(rank in graph.targets(source) for source in graph.sources(rank))
            assert all(rank in graph.sources(target) for target in graph.targets(rank))
            assert set(graph.sources(rank)) <= set(schedule.union.sources(rank))
            assert all(graph.weight(rank, source) > 0 for source in graph.sources(rank))


@every
def test_connected_and_gap(build, kind, size):
    schedule = build(kind, size)
    require_connected(schedule)
    assert schedule(0).is_doubly_stochastic or kind in PUSH
    assert schedule(0).is_symmetric or kind in DIRECTED
    if kind not in SCHEDULES:
        assert 0 < spectral_gap(schedule) <= 1


@every
def test_gap_vanishes_without_connection(build, kind, size):
    alone = build(kind, size)(0).mixing
    zeros = np.zeros_like(alone)
    twice = Topology("twice", np.block([[alone, zeros], [zeros, alone]]))
    assert not twice.is_connected
    assert spectral_gap(twice) == pytest.approx(0, abs=1e-9)


@every
def test_all_ranks_build_the_same(build, kind, size):
    for here, there in zip(graphs(build(kind, size)), graphs(build(kind, size)), strict=True):
        np.testing.assert_array_equal(here.mixing, there.mixing)


@pytest.mark.parametrize(("kind", "size"), [case for case in CASES if case[0] not in SCHEDULES])
def test_lazy_uniform_and_push(build, kind, size):
    plain = build(kind, size)
    np.testing.assert_allclose(build(kind, size, lazy=True).mixing, (np.eye(size) + plain.mixing) / 2)
    uniform = build(kind, size, weights="uniform")
    np.testing.assert_array_equal(uniform.mixing > 0, plain.mixing > 0)
    degrees = {len(uniform.sources(rank)) for rank in range(size)}
    is_regular = len(degrees | {len(uniform.targets(rank)) for rank in range(size)}) == 1
    assert uniform.is_doubly_stochastic == is_regular
    push = build(kind, size, weights="push")
    np.testing.assert_array_equal(push.mixing > 0, plain.mixing > 0)
    assert push.is_column_stochastic
    assert push.is_doubly_stochastic == is_regular


@pytest.mark.parametrize(("kind", "size"), [case for case in CASES if case[0] in GRIDS])
def test_grids_agree_with_their_coordinates(build, kind, size):
    graph = build(kind, size)
    assert math.prod(graph.dims) == size
    assert len(graph.periods) == len(graph.dims)
    for rank in range(size):
        assert graph.sources(rank) == sorted(cartesian_neighbors(rank, graph.dims, graph.periods) - {rank})


def cartesian_neighbors(rank, dims, periods):
    """Return the ranks at +- 1 along each dimension, by the row-major numbering of MPI_Cart_create."""
    found = set()
    coordinates = [int(coordinate) for coordinate in np.unravel_index(rank, dims)]
    for axis, (extent, periodic) in enumerate(zip(dims, periods, strict=True)):
        for shift in (-1, 1):
            moved = coordinates[axis] + shift
            if periodic or 0 <= moved < extent:
                shifted = [*coordinates[:axis], moved % extent, *coordinates[axis + 1 :]]
                found.add(int(np.ravel_multi_index(shifted, dims)))
    return found


@pytest.mark.parametrize("kind", sorted(TOPOLOGIES))
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_impossible_sizes_are_refused(build, kind, size):
    parameters = {"path": "graph.txt"} if kind == "file" else {}
    with pytest.raises(TopologyError, match=f"topology.kind = '{kind}' needs a whole number of ranks"):
        make_topology(kind, size, **parameters)
