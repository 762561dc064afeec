"""AD-PSGD: what theory says of pairwise averages, in simulated time and with late, torn and reordered writes."""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers, curvature, serve_until_done, train, train_asynchronously

from mpicomp.algorithms import ADPSGD, DPSGD
from mpicomp.compression import Cast, TopK
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.mailbox import Delays
from mpicomp.exchange.loopback.network import Links
from mpicomp.topology import chain, complete, complete_bipartite, exponential, hypercube, ring, star

LR = 0.1
UNEQUAL = [1.0, 1.3, 2.0, 4.0, 1.0, 0.7]
GRAPHS = [ring(6), ring(4), chain(3), star(4), complete_bipartite(5, 2), hypercube(4), ring(2)]
LINKS = Links(0.05, 1e4)


def recorded(graph, steps):
    """Return the trained models and the events in the order of simulated time: ``(what, rank, other rank)``."""
    events = []

    class Recorded(ADPSGD):
        def init(self, local, mailbox):
            update = local.update
            local.update = lambda: (events.append(("update", mailbox.rank, None)), update())
            return super().init(local, mailbox)

        def phases(self, local, state, mailbox):
            attempt = super().phases(local, state, mailbox)
            while True:
                try:
                    meanwhile = next(attempt)
                except StopIteration as end:
                    return end.value
                events.append(("gradient", mailbox.rank, None))
                yield meanwhile

        def _put(self, model, local, state, mailbox, target):
            if not state.is_active:
                events.append(("average", mailbox.rank, target))
            super()._put(model, local, state, mailbox, target)

    return train_asynchronously(Recorded(), graph, steps, UNEQUAL, links=LINKS), events


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")
def test_it_is_the_published_sequence_of_events(graph):
    steps, size = 20, graph.size
    trained, events = recorded(graph, steps)
    x, g = np.zeros((size, DIM)), np.zeros((size, DIM))
    for kind, rank, other in events:
        if kind == "gradient":
            g[rank] = curvature() * (x[rank] - centers(size)[rank])
        elif kind == "average":
            x[[rank, other]] = (x[rank] + x[other]) / 2
        else:
            x[rank] -= LR * g[rank]
    kinds = [kind for kind, *_ in events]
    assert kinds.count("gradient") == kinds.count("update") == steps * size
    active = {other for kind, _, other in events if kind == "average"}
    assert kinds.count("average") == steps * len(active)
    np.testing.assert_allclose(trained.x, x, rtol=0, atol=1e-12)


def test_two_ranks_of_equal_speed_are_d_psgd():
    steps = 25
    asynchronous = train_asynchronously(ADPSGD(), ring(2), steps, [1.0, 1.0], links=LINKS, jitter=0.0)
    synchronous = train(DPSGD(order="combine_then_adapt"), ring(2), steps)
    np.testing.assert_array_equal(asynchronous.x, synchronous.x)


def test_one_rank_is_sgd():
    trained = train_asynchronously(ADPSGD(), ring(1), 30, [1.0])
    x = np.zeros(DIM)
    for _ in range(30):
        x -= LR * curvature() * (x - centers(1)[0])
    np.testing.assert_allclose(trained.x[0], x, rtol=0, atol=1e-14)


def average_alone(world, graph, steps, by_meanwhile):
    """Do `steps` steps that only average; return the sum over ranks before and after them, and the own model."""
    x = torch.as_tensor(np.random.default_rng(world.rank).normal(size=DIM))
    local = Quadratic(x, torch.zeros(DIM, dtype=torch.float64), 0.0)
    algorithm = ADPSGD(seed=3)
    mailbox = world.mailbox(graph, algorithm.message_nbytes(local.spec, world.size), algorithm.depth)
    state = algorithm.init(local, mailbox)
    before = sum(world.all_gather(local.x.numpy().copy()))
    local.gradient = lambda meanwhile: [meanwhile() for _ in range(3 if meanwhile and by_meanwhile else 0)]
    while algorithm.updates(state) < steps:
        if not algorithm.step(local, state, mailbox):
            mailbox.pause()
    mailbox.announce(steps, is_done=True)
    serve_until_done(algorithm, local, state, mailbox)
    return before, local.x.numpy()


@pytest.mark.parametrize("by_meanwhile", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_is_preserved_however_late_writes_are(seed, by_meanwhile):
    graph, steps = ring(4), 200
    delays = Delays(seed, turns=15)
    outcomes = run(4, average_alone, graph, steps, by_meanwhile, delays=delays, cores=1)
    befores, models = zip(*outcomes, strict=True)
    np.testing.assert_allclose(np.sum(models, axis=0), befores[0], rtol=0, atol=1e-12)
    assert np.ptp(models, axis=0).max() < 1e-6  # and all ranks have come to it


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (ring(5), "topology.kind = 'ring' with 5 ranks has a cycle of odd length.*'ring' with an even number"),
        (complete(4), "has a cycle of odd length"),
        (exponential(8), "'exponential' has a directed edge"),
    ],
)
def test_graphs_on_which_ranks_could_wait_in_a_circle_are_refused(graph, message):
    with pytest.raises(TopologyError, match=message):
        ADPSGD().check(graph)


@pytest.mark.parametrize("compressor", [TopK(ratio=0.1), Cast(dtype="float16")])
def test_a_lossy_compressor_is_refused(compressor):
    with pytest.raises(ConfigError, match="would not continue from the same mean"):
        ADPSGD(compressor)
