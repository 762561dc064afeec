"""What theory says of the asynchronous methods: NumPy transcriptions on recorded schedules, identities, known optima.

Time is simulated, so that every run is the same run.
"""

import dataclasses

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train, train_asynchronously

from mpicomp.algorithms import ASGD, DCASGD, Choco, DCGossip
from mpicomp.algorithms.asynchronous.base import DelayCompensation
from mpicomp.compression import Identity, TopK
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.topology import OnePeerExponential, Topology, chain, complete, complete_bipartite, induced, ring, star

LR = 0.1
KEPT = 6
UNEQUAL = [1.0, 1.0, 1.3, 2.0, 4.0, 1.0]
CONSTANT = DCASGD(adaptive=False, lambda0=0.3)
ADAPTIVE = DCASGD(lambda0=0.5)
BY_WORKER = DCASGD(lambda0=0.5, mean_square="worker")


def star_of(algorithm, workers=4):
    return complete_bipartite(algorithm.hubs + workers, algorithm.hubs)


def transcription(algorithm, part, order):
    """The published update at the hub of `part`, for gradients of the workers in that `order`."""
    d, c = curvature()[part], centers(algorithm.hubs + 4)[:, part]
    w = np.zeros(len(d))
    models = {m: w.copy() for m in order}  # what each worker holds
    backups = {m: w.copy() for m in order}  # what the hub knows that it holds
    residuals = {m: np.zeros(len(d)) for m in order}
    by_worker = isinstance(algorithm, DCASGD) and algorithm.mean_square == "worker"
    mean_squares = {m if by_worker else 0: np.zeros(len(d)) for m in order}
    kept = None if isinstance(algorithm.compressor, Identity) else round(algorithm.compressor.ratio * len(d))
    for m in order:
        g = d * (models[m] - c[m])
        if kept is not None:
            residuals[m] += g
            g = top_k(residuals[m][None], kept)[0]
            residuals[m] -= g
        if isinstance(algorithm, DCASGD):
            lambda_t = algorithm.lambda0
            if algorithm.adaptive:
                place = m if by_worker else 0
                mean_squares[place] = mean_square = 0.95 * mean_squares[place] + 0.05 * g * g
                lambda_t = algorithm.lambda0 / np.sqrt(mean_square + 1e-7)
            g = g + lambda_t * g * g * (w - backups[m])
        w = w - LR * g
        answer = w if kept is None else backups[m] + top_k((w - backups[m])[None], kept)[0]
        backups[m] = models[m] = answer
    return w


@pytest.mark.parametrize("hubs", [1, 2])
@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=0.5)], ids=["dense", "topk"])
@pytest.mark.parametrize("method", [ASGD(), CONSTANT, ADAPTIVE, BY_WORKER], ids=["asgd", "dc_c", "dc_a", "by_worker"])
def test_hubs_apply_the_published_update(method, compressor, hubs):
    algorithm = dataclasses.replace(method, compressor=compressor, downlink=compressor, hubs=hubs)
    trained = train_asynchronously(algorithm, star_of(algorithm), 12, UNEQUAL)
    for hub in range(hubs):
        part = slice(DIM * hub // hubs, DIM * (hub + 1) // hubs)
        order = trained.served[hub]
        assert sorted(order) == sorted([*range(hubs, hubs + 4)] * 12)
        assert order[:8] != sorted(order[:8])  # workers of unequal speed do overtake each other
        np.testing.assert_allclose(trained.x[hub][part], transcription(algorithm, part, order), rtol=0, atol=1e-12)


def test_shards_over_slow_links_hold_what_one_hub_would_send():
    algorithm = DCASGD(hubs=2, compressor=TopK(ratio=0.5), downlink=TopK(ratio=0.5))
    trained = train_asynchronously(algorithm, star_of(algorithm), 10, UNEQUAL, links=Links(0.3, 200.0))
    for hub in range(2):
        part = slice(DIM * hub // 2, DIM * (hub + 1) // 2)
        for worker, backup in enumerate(trained.states[hub].backups):
            np.testing.assert_array_equal(backup.numpy(), trained.x[2 + worker][part])


@pytest.mark.parametrize("adaptive", [True, False])
def test_without_strength_dc_asgd_is_asgd(adaptive):
    plain, corrected = (
        train_asynchronously(algorithm, star(5), 20, UNEQUAL)
        for algorithm in (ASGD(), DCASGD(adaptive=adaptive, lambda0=0.0))
    )
    np.testing.assert_array_equal(plain.x, corrected.x)


@pytest.mark.parametrize("algorithm", [ASGD(), CONSTANT, ADAPTIVE, DCASGD(hubs=3)])
def test_one_worker_is_sgd(algorithm):
    trained = train_asynchronously(algorithm, star_of(algorithm, 1), 30, UNEQUAL)
    x = torch.zeros(DIM, dtype=torch.float64)
    for _ in range(30):
        x.sub_(torch.as_tensor(curvature()) * (x - torch.as_tensor(centers(algorithm.hubs + 1)[-1])), alpha=LR)
    np.testing.assert_array_equal(trained.x[-1], x.numpy())


def test_the_delay_of_equal_workers_is_their_number_less_one():
    trained = train_asynchronously(ASGD(), star(5), 20, [1.0] * 5)
    delays = trained.states[0].delays.sum(dim=0)
    assert delays.sum() == 4 * 20
    assert int(delays.argmax()) == 3


@pytest.mark.parametrize("algorithm", [ASGD(), CONSTANT, ADAPTIVE, ASGD(TopK(ratio=0.2), TopK(ratio=0.2))])
def test_hubs_find_a_common_optimum(algorithm):
    trained = train_asynchronously(algorithm, star(5), 150, UNEQUAL, common=True)
    np.testing.assert_allclose(trained.x[0], centers(5)[0], rtol=0, atol=1e-6)


def test_the_correction_is_the_equation():
    random = np.random.default_rng(0)
    g, moved, ms = random.normal(size=7), random.normal(size=7), random.uniform(size=7)
    compensation = DelayCompensation(lambda0=2.0, adaptive=True, decay=0.95, epsilon=1e-7)
    gradient, mean_square = torch.tensor(g), torch.tensor(ms)
    ratio = compensation.correct_(gradient, torch.tensor(moved), mean_square)
    new = 0.95 * ms + 0.05 * g * g
    correction = 2 / np.sqrt(new + 1e-7) * g * g * moved
    np.testing.assert_allclose(ratio, np.linalg.norm(correction) / np.linalg.norm(g), rtol=1e-14)
    np.testing.assert_allclose(mean_square, new, rtol=1e-15)
    np.testing.assert_allclose(gradient, g + correction, rtol=1e-14)


@pytest.mark.parametrize("compressor", [Identity(), TopK(ratio=KEPT / DIM)], ids=["dense", "topk"])
@pytest.mark.parametrize("graph", [ring(5), chain(3), star(4), ring(2)], ids=lambda g: f"{g.name}{g.size}")
def test_gossip_without_staleness_is_choco_overlapped(graph, compressor):
    steps = 25
    asynchronous = train_asynchronously(
        DCGossip(0.2, compressor, lambda0=0.0, max_staleness=0), graph, steps, UNEQUAL, links=Links(0.2, 1e4)
    )
    synchronous = train(Choco(0.2, compressor, overlap=True), graph, steps)
    np.testing.assert_allclose(asynchronous.x, synchronous.x, rtol=0, atol=1e-12)


def test_gossip_corrects_for_what_it_mixes_in():
    graph, steps, gamma, strength = ring(3), 15, 0.4, 0.5
    algorithm = DCGossip(gamma, lambda0=strength, adaptive=False, max_staleness=0)
    x, hat = np.zeros((3, DIM)), np.zeros((3, DIM))
    for _ in range(steps):
        hat = x.copy()
        g = curvature() * (x - centers(3))
        moved = gamma * (graph.mixing @ hat - hat)
        correction = strength * g * g * moved
        lengths = [np.linalg.norm(v, axis=1, keepdims=True) for v in (g, correction)]
        limited = correction * np.minimum(1, lengths[0] / np.maximum(lengths[1], 1e-30))
        x = x - LR * (g + limited) + moved
    np.testing.assert_allclose(train_asynchronously(algorithm, graph, steps, UNEQUAL).x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [0, 1, 3, None])
def test_staleness_is_bounded_on_request(bound):
    algorithm = DCGossip(0.3, TopK(ratio=0.5), max_staleness=bound)
    trained = train_asynchronously(algorithm, ring(4), 40, [1.0, 1.0, 1.0, 4.0], common=True)
    largest = max(int(row.nonzero().max()) for state in trained.states for row in state.delays)
    assert largest == bound if bound is not None else largest > 20


@pytest.mark.parametrize("algorithm", [DCGossip(1.0), DCGossip(0.3, TopK(ratio=0.25)), DCGossip(0.3, lambda0=0.0)])
def test_gossip_finds_a_common_optimum(algorithm):
    trained = train_asynchronously(algorithm, ring(5), 200, UNEQUAL, common=True)
    np.testing.assert_allclose(trained.x, np.tile(centers(5)[0], (5, 1)), rtol=0, atol=1e-3)


def test_public_copies_are_what_the_neighbors_know():
    graph = chain(4)
    trained = train_asynchronously(DCGossip(0.3, TopK(ratio=0.25)), graph, 30, UNEQUAL)
    hats = np.stack([state.x_hat.numpy() for state in trained.states])
    sums = np.stack([state.s.numpy() for state in trained.states])
    np.testing.assert_allclose(sums, graph.mixing @ hats, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 0, 2])
def test_survivors_start_their_public_copies_anew(bound):
    graph, kept = ring(4), [0, 1, 3]
    left = induced(graph, kept)
    algorithm = DCGossip(0.3, TopK(ratio=0.25), max_staleness=bound)
    locals_, states = {}, {}

    def train_until(world, rank, mailbox, end):
        local, state = locals_[rank], states[rank]
        local.gradient = lambda _: (world.sleep([1.0, 1.1, 1.3, 2.0][rank]), type(local).gradient(local))[1]
        while world.now() < end:
            if not algorithm.step(local, state, mailbox):
                mailbox.pause()

    def begin(world):
        local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.as_tensor(centers(4)[0]), LR)
        mailbox = world.mailbox(graph, algorithm.message_nbytes(local.spec, 4), algorithm.depth)
        locals_[world.rank], states[world.rank] = local, algorithm.init(local, mailbox)
        train_until(world, world.rank, mailbox, 10)

    def go_on(world):
        rank = kept[world.rank]
        local, state = locals_[rank], states[rank]
        mailbox = world.mailbox(left, algorithm.message_nbytes(local.spec, 3), algorithm.depth)
        algorithm.regroup_(local, state, mailbox, world.exchange(left))
        hats, steps = world.all_gather(state.x_hat.numpy().copy()), world.all_gather(state.steps)
        np.testing.assert_array_equal(hats[world.rank], local.x.numpy())
        np.testing.assert_allclose(state.s.numpy(), left.mixing[world.rank] @ hats, rtol=0, atol=1e-12)
        assert state.heard == [steps[source] for source in left.sources(world.rank)]
        train_until(world, rank, mailbox, 250)
        mailbox.settle()
        algorithm.drain(local, state, mailbox)
        hats = world.all_gather(state.x_hat.numpy().copy())
        np.testing.assert_allclose(state.s.numpy(), left.mixing[world.rank] @ hats, rtol=0, atol=1e-12)
        return state.steps - steps[world.rank], local.x.numpy()

    run(4, begin, simulated=Links(0.2, 1e4))
    steps, found = zip(*run(3, go_on, simulated=Links(0.2, 1e4)), strict=True)
    assert min(steps) > 100
    np.testing.assert_allclose(found, np.tile(centers(4)[0], (3, 1)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "graph", "message"),
    [
        (lambda: ASGD(), ring(4), "topology.kind = 'ring': ASGD needs an edge between hub 0 and worker 2.*'star'"),
        (lambda: ASGD(hubs=2), star(4), "'complete_bipartite' with topology.hubs = 2"),
        (lambda: ASGD(), star(1), "there must be a worker beside the hubs, so start at least 2 ranks"),
        (lambda: ASGD(hubs=3), complete(3), "start at least 4 ranks"),
        (lambda: DCGossip(0.1), OnePeerExponential(4), "changes from step to step"),
        (lambda: DCGossip(0.1), Topology("two pairs", np.kron(np.eye(2), np.full((2, 2), 0.5))), "is not connected"),
    ],
)
def test_unusable_graphs_are_refused(make, graph, message):
    with pytest.raises(TopologyError, match=message):
        make().check(graph)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DCASGD(lambda0=-1.0), "algorithm.lambda0 = -1.0 must be"),
        (lambda: DCASGD(decay=1.0), "algorithm.decay = 1.0 must be"),
        (lambda: DCASGD(epsilon=0.0), "algorithm.epsilon = 0.0 must be"),
        (lambda: ASGD(hubs=0), "algorithm.hubs = 0 must be"),
        (lambda: DCGossip(0.0), "algorithm.gamma = 0.0 must be"),
        (lambda: DCGossip(0.1, max_staleness=-1), "algorithm.max_staleness = -1 must be"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
