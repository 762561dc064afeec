"""Graphs against their closed forms (gaps to four digits), their edges at awkward sizes, and what they refuse."""

import math

import networkx as nx
import numpy as np
import pytest

from mpicomp import topology as topologies
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.topology import Topology, spectral_gap
from mpicomp.topology.static import balanced_dims


def neighbors(graph: Topology) -> list[list[int]]:
    return [graph.sources(rank) for rank in range(graph.size)]


@pytest.mark.parametrize(
    ("kind", "size", "gap"),
    [
        *(("complete", n, 1.0) for n in (8, 16, 32, 64)),
        *zip(["ring"] * 4, [8, 16, 32, 64], [0.1953, 0.0507, 0.0128, 0.0032], strict=True),
        *zip(["torus"] * 4, [9, 16, 32, 64], [0.6, 0.4, 0.1172, 0.1172], strict=True),
        *zip(["hypercube"] * 4, [8, 16, 32, 64], [0.5, 0.4, 0.3333, 0.2857], strict=True),
        *zip(["exponential"] * 4, [8, 16, 32, 64], [0.5, 0.4, 0.3333, 0.2857], strict=True),
        *zip(["chain"] * 4, [8, 16, 32, 64], [0.0507, 0.0128, 0.0032, 0.0008], strict=True),
        *zip(["star"] * 4, [8, 16, 32, 64], [0.125, 0.0625, 0.0313, 0.0156], strict=True),
        ("dyck", 32, 0.1910),
        ("ring", 4, 0.6667),
    ],
)
def test_gap_to_four_digits(kind, size, gap):
    # 0.03125 is listed as 0.0313, half a unit away.
    assert spectral_gap(topologies.make_topology(kind, size)) == pytest.approx(gap, abs=5.1e-5)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 33])
def test_closed_forms(size):
    ring_gap = 2 / 3 * (1 - math.cos(2 * math.pi / size))
    assert spectral_gap(topologies.ring(size)) == pytest.approx(ring_gap, abs=1e-12)
    chain_gap = 2 / 3 * (1 - math.cos(math.pi / size))
    assert spectral_gap(topologies.chain(size)) == pytest.approx(chain_gap, abs=1e-12)
    assert spectral_gap(topologies.star(size)) == pytest.approx(1 / size, abs=1e-12)
    if size % 2 == 0:
        exponential_gap = 2 / (1 + math.ceil(math.log2(size)))
        assert spectral_gap(topologies.exponential(size)) == pytest.approx(exponential_gap, abs=1e-12)


def test_torus_eigenvalues():
    a, b = 5, 4
    angles_a, angles_b = (2 * np.pi * np.arange(extent) / extent for extent in (a, b))
    expected = (1 + 2 * np.cos(angles_a)[:, None] + 2 * np.cos(angles_b)) / 5
    found = np.linalg.eigvalsh(topologies.torus(a * b, dims=(a, b)).mixing)
    np.testing.assert_allclose(found, np.sort(expected.ravel()), atol=1e-12)


def test_hypercube_eigenvalues():
    found = np.linalg.eigvalsh(topologies.hypercube(16).mixing)
    expected = np.repeat([(1 + 4 - 2 * k) / 5 for k in range(5)], [math.comb(4, k) for k in range(5)])
    np.testing.assert_allclose(found, np.sort(expected), atol=1e-12)


def test_dyck_is_the_dyck_graph():
    graph = topologies.dyck(32)
    adjacency = (graph.mixing > 0) & ~np.eye(32, dtype=bool)
    net = nx.from_numpy_array(adjacency)
    assert {degree for _, degree in net.degree()} == {3}
    assert nx.is_bipartite(net)
    assert nx.girth(net) == 6
    assert nx.diameter(net) == 5
    expected = np.repeat([-3, -(5**0.5), -1, 1, 5**0.5, 3], [1, 6, 9, 9, 6, 1])
    np.testing.assert_allclose(np.linalg.eigvalsh(adjacency.astype(float)), expected, atol=1e-9)
    assert nx.is_isomorphic(net, nx.LCF_graph(32, [5, -5, 13, -13], 8))
    assert spectral_gap(graph) == pytest.approx((3 - 5**0.5) / 4, abs=1e-12)


@pytest.mark.parametrize("kind", ["ring", "chain", "torus", "hypercube", "exponential", "complete", "star"])
def test_one_and_two_ranks(kind):
    alone = topologies.make_topology(kind, 1)
    assert alone.mixing.tolist() == [[1.0]]
    assert alone.sources(0) == alone.targets(0) == []
    assert topologies.make_topology(kind, 2).mixing.tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_small_rings_and_chains():
    assert neighbors(topologies.ring(3)) == [[1, 2], [0, 2], [0, 1]]
    assert neighbors(topologies.ring(5)) == [[1, 4], [0, 2], [1, 3], [2, 4], [0, 3]]
    assert neighbors(topologies.chain(4)) == [[1], [0, 2], [1, 3], [2]]
    np.testing.assert_allclose(np.diag(topologies.chain(4).mixing), [2 / 3, 1 / 3, 1 / 3, 2 / 3])


@pytest.mark.parametrize("dims", [(2, 2), (2, 5), (5, 2), (1, 6), (2, 2, 2), (2, 1, 3)])
def test_thin_tori_count_a_neighbor_once(dims):
    graph = topologies.torus(math.prod(dims), dims=dims)
    degree = sum(2 if extent > 2 else extent - 1 for extent in dims)
    assert {len(graph.sources(rank)) for rank in range(graph.size)} == {degree}
    assert set(graph.mixing[graph.mixing > 0].round(12)) == {round(1 / (degree + 1), 12)}


@pytest.mark.parametrize(
    ("size", "ndim", "dims"),
    [(8, 2, (4, 2)), (32, 2, (8, 4)), (7, 2, (7, 1)), (8, 3, (2, 2, 2)), (12, 3, (3, 2, 2)), (1, 2, (1, 1))],
)
def test_default_extents_are_the_closest_to_a_cube(size, ndim, dims):
    assert balanced_dims(size, ndim) == dims
    assert topologies.torus(size, ndim=ndim).dims == dims


def test_large_default_extents_are_found_at_once():
    assert balanced_dims(4096, 12) == (2,) * 12


def test_hypercube_joins_ranks_that_differ_in_one_bit():
    assert neighbors(topologies.hypercube(8)) == [sorted(rank ^ (1 << k) for k in range(3)) for rank in range(8)]


def test_exponential_sends_ahead_by_powers_of_two():
    graph = topologies.exponential(5)
    assert graph.targets(0) == [1, 2, 4]
    assert graph.sources(0) == [1, 3, 4]
    assert not graph.is_symmetric
    assert graph.is_doubly_stochastic


def test_directed_ring_sends_to_the_next():
    graph = topologies.directed_ring(5)
    assert [graph.targets(rank) for rank in range(5)] == [[1], [2], [3], [4], [0]]
    assert graph.is_doubly_stochastic and not graph.is_symmetric
    assert graph.weight(1, 0) == graph.weight(1, 1) == 0.5
    assert topologies.directed_ring(2).is_symmetric


@pytest.mark.parametrize(("size", "degree"), [(1, 2), (2, 1), (5, 1), (5, 4), (40, 2), (40, 7)])
def test_random_digraph_sends_to_as_many_as_asked_and_reaches_all(size, degree):
    for seed in range(5):
        graph = topologies.random_digraph(size, degree=degree, seed=seed)
        assert {len(graph.targets(rank)) for rank in range(size)} == {min(degree, size - 1)}
        assert nx.is_strongly_connected(nx.DiGraph(graph.mixing.T))
        np.testing.assert_allclose(graph.mixing[graph.mixing > 0], 1 / (1 + min(degree, size - 1)))
    assert size < 40 or len({len(graph.sources(rank)) for rank in range(size)}) > 2


def test_random_digraph_draws_all_targets_alike():
    counts = sum(topologies.random_digraph(6, degree=3, seed=seed).mixing > 0 for seed in range(400))
    others = counts[~np.eye(6, dtype=bool)]
    assert np.abs(others - 400 * 3 / 5).max() < 5 * math.sqrt(400 * 3 / 5 * 2 / 5)


def test_star_has_its_hub_at_rank_zero():
    graph = topologies.star(4)
    assert neighbors(graph) == [[1, 2, 3], [0], [0], [0]]
    np.testing.assert_allclose(np.diag(graph.mixing), [1 / 4, 3 / 4, 3 / 4, 3 / 4])


def test_complete_bipartite_joins_hubs_and_others():
    assert neighbors(topologies.complete_bipartite(5, 2)) == [[2, 3, 4], [2, 3, 4], [0, 1], [0, 1], [0, 1]]
    np.testing.assert_array_equal(topologies.complete_bipartite(4, 1).mixing, topologies.star(4).mixing)
    with pytest.raises(TopologyError, match=r"topology\.hubs = 4: must be fewer than the 4 ranks"):
        topologies.complete_bipartite(4, 4)


@pytest.mark.parametrize("kind", ["random_regular", "random_digraph", "erdos_renyi"])
def test_random_graphs_depend_on_the_seed_alone(kind):
    first, again, other = (topologies.make_topology(kind, 16, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.mixing, again.mixing)
    assert (first.mixing != other.mixing).any()


def test_random_regular_is_regular():
    graph = topologies.random_regular(10, degree=3, seed=1)
    assert {len(row) for row in neighbors(graph)} == {3}
    assert topologies.random_regular(1, degree=0).mixing.tolist() == [[1.0]]


def test_sparse_erdos_renyi_is_drawn_until_it_is_connected():
    for seed in range(20):
        assert topologies.erdos_renyi(8, probability=0.25, seed=seed).is_connected


@pytest.mark.parametrize(
    ("kind", "size", "parameters", "message"),
    [
        ("ring", 0, {}, "topology.kind = 'ring' needs a whole number of ranks, at least 1, not 0"),
        ("hypercube", 6, {}, "needs a power of two as the number of ranks, not 6; the nearest are 4 and 8"),
        ("dyck", 8, {}, "topology.kind = 'dyck' exists with 32 ranks only, not 8"),
        ("torus", 8, {"dims": [3, 3]}, r"topology.dims = \[3, 3\] must multiply to .* 8, not to 9; e.g. \[4, 2\]"),
        ("torus", 8, {"dims": [4, 2], "ndim": 3}, r"topology.ndim = 3 contradicts topology.dims = \[4, 2\]"),
        ("torus", 8, {"dims": "4x2"}, r"topology.dims = '4x2' must be a list of extents, e.g. \[4, 2\]"),
        ("torus", 8, {"dims": [8, 0]}, "topology.dims = 0 must be a whole number of at least 1"),
        ("torus", 8, {"ndim": 0}, "topology.ndim = 0 must be a whole number of at least 1"),
        ("random_regular", 4, {"degree": 4}, "topology.degree = 4 must be below the number of ranks, 4"),
        ("random_regular", 5, {"degree": 3}, "an odd degree needs an even number of ranks; use 2"),
        ("random_regular", 6, {"degree": 1}, "topology.degree = 1 leaves 6 ranks disconnected; use at least 2"),
        ("random_regular", 6, {"degree": "two"}, "topology.degree = 'two' must be a whole number"),
        ("random_regular", 6, {"degree": 2, "seed": -1}, "topology.seed = -1 must be a whole number of at least 0"),
        ("random_digraph", 4, {"degree": 4}, "topology.degree = 4 must be below the number of ranks, 4; at most 3"),
        ("random_digraph", 4, {"degree": 0}, "topology.degree = 0 must be a whole number of at least 1"),
        ("erdos_renyi", 8, {"probability": 0}, "topology.probability = 0 must be a number above 0 and at most 1"),
        ("erdos_renyi", 8, {"probability": 1.5}, "topology.probability = 1.5 must be"),
        ("erdos_renyi", 64, {"probability": 0.001}, r"none of 100 graphs .* is connected; raise topology.probability"),
        ("ring", 4, {"lazy": "yes"}, "topology.lazy = 'yes' must be true or false"),
    ],
)
def test_impossible_graphs_are_refused(kind, size, parameters, message):
    with pytest.raises(TopologyError, match=message):
        topologies.make_topology(kind, size, **parameters)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"topology.kind = 'rin' is unknown. Did you mean 'ring'\? Known: chain"):
        topologies.make_topology("rin", 4)
    with pytest.raises(ConfigError, match=r"topology.weights = 'metropolys' is unknown. Did you mean 'metropolis'\?"):
        topologies.ring(4, weights="metropolys")
    with pytest.raises(ConfigError, match=r"topology.degre is no parameter .* Did you mean 'degree'\? Known: degree"):
        topologies.make_topology("random_regular", 8, degre=3)
    with pytest.raises(ConfigError, match=r"topology.path is missing: topology.kind = 'file' needs it"):
        topologies.make_topology("file", 8)
