"""Gossip methods that go on over another graph, from the midst of a step, as they do when ranks have died."""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, centers
from support.steps import one_step

from mpicomp.algorithms import DPSGD, AdaGossip, Choco
from mpicomp.compression import RandomK, TopK
from mpicomp.errors import RankLost
from mpicomp.exchange.loopback import run
from mpicomp.topology import OnePeerExponential, complete, ring

SIZE = 4
METHODS = {
    "dpsgd": (DPSGD(), OnePeerExponential, OnePeerExponential),
    "choco": (Choco(0.3, TopK(ratio=0.25)), complete, ring),
    "choco_auto": (Choco("auto", TopK(ratio=0.25)), complete, ring),
    "choco_random": (Choco(0.1, RandomK(ratio=0.25)), complete, ring),
    "adagossip": (AdaGossip(0.05, TopK(ratio=0.25)), complete, ring),
    "quasi_global": (AdaGossip(0.05, TopK(ratio=0.25), quasi_global_momentum=0.5), complete, ring),
}


class Broken:
    """An exchange whose messages can no longer be sent."""

    def __init__(self, exchange):
        self.rank, self.size, self.schedule = exchange.rank, exchange.size, exchange.schedule

    def start(self, *arguments):
        raise RankLost("rank 4 has died", (4,))


def steps(algorithm, local, state, exchange, count):
    for _ in range(count):
        one_step(algorithm, local, state, exchange)


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_step_leaves_no_trace(name):
    """The mean over ranks still comes to the optimum, and the public copies are those of the neighbors."""
    algorithm, before, after = METHODS[name]

    def rank(world):
        x = torch.zeros(DIM, dtype=torch.float64)
        local = Quadratic(x, torch.tensor(centers(SIZE)[world.rank]), lr=0.02)
        old = world.exchange(before(SIZE))
        state = algorithm.init(local, old)
        steps(algorithm, local, state, old, 5)
        if world.rank % 2:  # these ranks have taken their local step when the news comes
            with pytest.raises(RankLost):
                one_step(algorithm, local, state, Broken(old))
        topology = after(SIZE)
        new = world.exchange(topology)
        algorithm.regroup_(local, state, new)
        held = torch.stack(world.all_gather(local.x.clone())).numpy()
        if hasattr(state, "x_hat"):
            weights = np.array([topology(0).weight(world.rank, other) for other in range(SIZE)])
            assert torch.equal(state.x_hat, local.x)
            np.testing.assert_allclose(state.s.numpy(), weights @ held, rtol=1e-12)
        steps(algorithm, local, state, new, 800)
        world.mean_(local.x)
        return local.x.numpy()

    found = run(SIZE, rank)
    allowed = 0.25 if isinstance(algorithm, AdaGossip) else 1e-3  # AdaGossip does not preserve the mean
    np.testing.assert_allclose(found[0], centers(SIZE).mean(axis=0), atol=allowed)
