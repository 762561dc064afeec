"""PowerGossip: the listing in NumPy, what holds of every edge, and known optima."""

import copy

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, Quadratic, centers, curvature, train
from support.steps import one_step

from mpicomp.algorithms import DPSGD, SGD, LocalSGD, PowerGossip
from mpicomp.algorithms.low_rank import LowRank
from mpicomp.compression import Spec
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.exchange.loopback import run
from mpicomp.topology import (
    OnePeerExponential,
    RandomMatching,
    Topology,
    chain,
    complete,
    exponential,
    hypercube,
    ring,
    star,
    torus,
)

LR = 0.1
SHAPES = ((4,), (4, 5))
VECTOR = 4
GRAPHS = [ring(5), ring(2), chain(3), star(4), torus(6), ring(1), RandomMatching(4), RandomMatching(5, seed=2)]
named = pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")


def spread(size):
    return np.random.default_rng(3).normal(size=(size, DIM))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def distance(x):
    return np.linalg.norm(x - x.mean(axis=0))


def basis(a):
    """Orthonormal columns with the span of `a`, from another decomposition than that of the code."""
    u, _, v = np.linalg.svd(a, full_matrices=False)
    return u @ v


def drawn(method, edge, step):
    spec = Spec(("a", "b"), SHAPES, torch.float64)
    return method._draw(LowRank(spec, method.rank), torch.zeros(DIM, dtype=torch.float64), *edge, step)


def by_hand(method, graph, steps, start):
    """Every edge in turn, with the matrices of the models as they were before the iteration."""
    rows, columns = SHAPES[1]
    x, kept, iteration = start.copy(), {}, 0
    for step in range(steps):
        x = x - LR * curvature() * (x - centers(len(x)))
        w = graph(step).mixing
        edges = [(i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if w[i, j]]
        before = x[:, :VECTOR].copy()
        for k in range(method.iterations):
            iteration += 1
            matrices = x[:, VECTOR:].reshape(-1, rows, columns).copy()
            for i, j in edges:
                if (i, j) not in kept or (k == 0 and not isinstance(graph, Topology)):
                    left, right = drawn(method, (i, j), step if not isinstance(graph, Topology) else 0)
                    kept[i, j] = left.numpy().reshape(rows, -1), right.numpy().reshape(columns, -1)
                p, q = kept[i, j]
                if iteration % 2 == 1:
                    q = basis(q)
                    p = matrices[j] @ q - matrices[i] @ q
                else:
                    p = basis(p)
                    q = matrices[j].T @ p - matrices[i].T @ p
                kept[i, j] = p, q
                move = w[i, j] * (p @ q.T).ravel()
                x[i, VECTOR:] += move
                x[j, VECTOR:] -= move
        x[:, :VECTOR] = w @ before
    return x


@named
@pytest.mark.parametrize(("rank", "iterations"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_the_listing(graph, rank, iterations):
    method = PowerGossip(rank, iterations, seed=5)
    trained = train(method, graph, 12, start=spread(graph.size), shapes=SHAPES)
    close(trained.x, by_hand(method, graph, 12, spread(graph.size)))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_both_ends_of_an_edge_hold_the_same_bits(iterations):
    graph = torus(6)
    states = train(PowerGossip(2, iterations), graph, 7, start=spread(6), shapes=SHAPES).states
    for rank, state in enumerate(states):
        assert state.left.shape == (len(graph.sources(rank)), 4 * 2)
        assert state.right.shape == (len(graph.sources(rank)), 5 * 2)
        for place, neighbor in enumerate(graph.sources(rank)):
            other = graph.sources(neighbor).index(rank)
            assert torch.equal(state.left[place], states[neighbor].left[other])
            assert torch.equal(state.right[place], states[neighbor].right[other])


def test_edges_begin_with_matrices_of_their_own_and_so_do_steps():
    method = PowerGossip()
    factors = [drawn(method, edge, step).right for edge in ((0, 1), (0, 2), (1, 2)) for step in range(3)]
    assert len({tuple(factor.tolist()) for factor in factors}) == 9
    assert torch.equal(drawn(method, (2, 1), 4).left, drawn(method, (1, 2), 4).left)
    assert not torch.equal(drawn(PowerGossip(seed=1), (1, 2), 4).left, drawn(method, (1, 2), 4).left)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_edges_of_equal_models_find_what_differs_later(rank, iterations):
    """In the last row and column, where the basis that QR makes of zeros does not look."""

    def serve(world):
        center = torch.zeros(DIM, dtype=torch.float64)
        center[-1] = world.rank + 1.0
        local = Quadratic(torch.zeros_like(center), center, lr=0.0, shapes=SHAPES)
        exchange, method = world.exchange(ring(2)), PowerGossip(rank, iterations)
        state = method.init(local, exchange)
        for local.lr in [0.0] * 4 + [LR] * 60:
            one_step(method, local, state, exchange)
        return local.x.numpy(), state

    (first, state), (second, other) = run(2, serve)
    assert abs(first[-1] - second[-1]) < 0.2
    assert abs(first[-1] + second[-1] - 3) < 0.01
    assert torch.equal(state.left, other.left) and torch.equal(state.right, other.right)


def test_no_matrices_are_kept_of_pairs_that_do_not_last():
    for state in train(PowerGossip(), RandomMatching(6), 3, shapes=SHAPES).states:
        assert not state.left.numel() and not state.right.numel()


@named
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_mean_is_preserved(graph, iterations):
    start = spread(graph.size)
    x = train(PowerGossip(1, iterations), graph, 60, lr=0.0, start=start, shapes=SHAPES).x
    assert graph.size == 1 or np.abs(x - start).max() > 0.1  # it did move
    close(x.mean(axis=0), start.mean(axis=0), 1e-13)


@named
def test_full_rank_is_dpsgd(graph):
    close(train(PowerGossip(rank=4), graph, 20, shapes=SHAPES).x, train(DPSGD(), graph, 20, shapes=SHAPES).x)


def test_a_whole_power_iteration_carries_a_difference_of_its_rank_over():
    """On a pair that averages with weight 1/2: D - D q q' has the columns of D, so what is left of it is found."""
    start = spread(2)
    u, v = np.random.default_rng(1).normal(size=(2, 5))
    start[1, VECTOR:] = start[0, VECTOR:] + np.outer(u[:4], v).ravel()
    pair = RandomMatching(2)
    close(train(PowerGossip(1, 2), pair, 1, lr=0.0, start=start, shapes=SHAPES).x, np.tile(start.mean(axis=0), (2, 1)))
    assert distance(train(PowerGossip(1, 1), pair, 1, lr=0.0, start=start, shapes=SHAPES).x) > 0.1


@pytest.mark.parametrize("graph", [ring(8), hypercube(8), complete(5), RandomMatching(8)], ids=lambda g: g.name)
@pytest.mark.parametrize("iterations", [1, 2])
def test_consensus_is_linear(graph, iterations):
    start = spread(graph.size)
    found = [
        distance(train(PowerGossip(1, iterations), graph, steps, lr=0.0, start=start, shapes=SHAPES).x)
        for steps in (0, 150, 300)
    ]
    assert found[1] < 1e-2 * found[0]
    assert found[2] < 1e-2 * found[1] or found[2] < 1e-12


def test_warm_matrices_turn_towards_what_matters():
    """On a difference with one large singular value: kept from step to step, they find it; random ones do not."""
    generator = np.random.default_rng(2)
    u, v = generator.normal(size=(2, 5))

    def left_after(graph):
        start = np.zeros((2, DIM))
        start[1, VECTOR:] = 10 * np.outer(u[:4], v).ravel() + generator.normal(size=20)
        return distance(train(PowerGossip(), graph, 4, lr=0.0, start=start, shapes=SHAPES).x)

    assert left_after(ring(2)) < 0.3 * left_after(RandomMatching(2))


@pytest.mark.parametrize("graph", [ring(8), RandomMatching(8)], ids=lambda g: g.name)
def test_optimum_up_to_the_bias_of_a_constant_rate(graph):
    found = []
    for lr in (0.04, 0.02):
        x = train(PowerGossip(1, 2), graph, 500, lr=lr, shapes=SHAPES).x
        found.append(np.linalg.norm(x - centers(8).mean(axis=0)))
    assert found[1] < 0.7 * found[0]


def test_one_rank_is_plain_sgd_bit_for_bit():
    alone = train(SGD(), ring(1), 15, momentum=0.9)
    assert np.array_equal(train(PowerGossip(), ring(1), 15, momentum=0.9).x, alone.x)


def test_local_sgd_of_period_one_is_its_inner_algorithm_bit_for_bit():
    local, plain = (train(m, ring(5), 9, shapes=SHAPES) for m in (LocalSGD(1, PowerGossip()), PowerGossip()))
    assert np.array_equal(local.x, plain.x)
    assert local.bytes_sent == plain.bytes_sent


def test_bytes():
    """Of float64: P (4, r) or Q (5, r) in turn, and the vector (4,) once a step, to each neighbor."""
    for degree, graph in ((2, ring(5)), (4, complete(5)), (1, RandomMatching(4))):
        for rank in (1, 2):
            sent = train(PowerGossip(rank), graph, 3, shapes=SHAPES).bytes_sent
            assert sent == [degree * 8 * ((4 + 5 + 4) * rank + 3 * VECTOR)] * graph.size
        sent = train(PowerGossip(1, 2), graph, 3, shapes=SHAPES).bytes_sent
        assert sent == [degree * 8 * 3 * (4 + 5 + VECTOR)] * graph.size


def test_a_restart_on_random_pairs_is_exact():
    def run(world, saved=None):
        gossip, closure = small.make(world, PowerGossip(1, 2), RandomMatching, seed=0 if saved is None else 1)
        if saved is not None:
            gossip.load_state_dict(saved[world.rank])
        for step in range(0 if saved is None else 5, 5):
            gossip.step(closure(step))
        kept = copy.deepcopy(gossip.state_dict())
        for step in range(5, 9):
            gossip.step(closure(step))
        return kept, gossip.local.x.clone()

    first = loopback.run(5, run)
    for (_, x), (_, again) in zip(first, loopback.run(5, run, [saved for saved, _ in first]), strict=True):
        assert torch.equal(x, again)


@pytest.mark.parametrize("key", ["rank", "iterations"])
def test_numbers_below_one_are_refused(key):
    with pytest.raises(ConfigError, match=f"algorithm.{key} = 0 must be at least 1"):
        PowerGossip(**{key: 0})


@pytest.mark.parametrize("graph", [exponential(5), OnePeerExponential(4), star(4, weights="uniform")])
def test_weights_that_are_not_symmetric_are_refused(graph):
    with pytest.raises(TopologyError, match="PowerGossip needs symmetric ones"):
        PowerGossip().check(graph)
    PowerGossip().check(RandomMatching(4))
