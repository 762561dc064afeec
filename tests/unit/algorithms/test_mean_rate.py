"""At what rate asynchronous methods move the mean model: the figures of docs/which_method.md.

With one constant gradient on all ranks, the mean model moves by the learning rate times the mean number of gradients
times this gradient, if the method preserves the mean over ranks. The ratio of the two is the rate.
"""

import numpy as np
import pytest
import torch
from support.quadratic import DIM, Quadratic, serve_until_done

from mpicomp.algorithms import ADPSGD, DCGossip
from mpicomp.compression import TopK
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.topology import ring

LR = 0.1
SECONDS = 400
PACES = {"equal": [1, 1, 1, 1], "four times slower": [1, 1, 1, 4], "ten times slower": [1, 1, 1, 10]}


def mean_rate(algorithm, paces, links=None):
    """Return the rate of the mean model over `SECONDS` of simulated time; a gradient takes ``paces[rank]``."""
    graph = ring(len(paces))

    def serve(world):
        local = Quadratic(*torch.zeros(2, DIM, dtype=torch.float64), LR)
        mailbox = world.mailbox(graph, algorithm.message_nbytes(local.spec, world.size), algorithm.depth)
        state = algorithm.init(local, mailbox)

        def gradient(meanwhile=None):
            slices = 10 if meanwhile else 1
            for _ in range(slices):
                world.sleep(paces[world.rank] / slices)
                if meanwhile:
                    meanwhile()
            return local.g.fill_(-1)

        local.gradient = gradient
        while world.now() < SECONDS or algorithm.is_unfinished(state):
            if not algorithm.step(local, state, mailbox):
                mailbox.pause()
        mailbox.announce(algorithm.updates(state), is_done=True)
        serve_until_done(algorithm, local, state, mailbox)
        return local.x.numpy(), algorithm.updates(state)

    models, gradients = zip(*run(len(paces), serve, simulated=links or Links()), strict=True)
    assert gradients[0] >= SECONDS and gradients[3] == pytest.approx(SECONDS / paces[3], abs=2)
    return float(np.mean(models) / (LR * np.mean(gradients)))


@pytest.mark.parametrize(
    ("gamma", "speeds", "rate"),
    [
        (1.0, "equal", 1.50),
        (1.0, "four times slower", 0.98),
        (1.0, "ten times slower", 0.50),
        (0.5, "equal", 1.20),
        (0.5, "four times slower", 0.84),
        (0.5, "ten times slower", 0.47),
    ],
)
def test_dc_gossip_moves_the_mean_at_another_rate(gamma, speeds, rate):
    assert mean_rate(DCGossip(gamma, lambda0=0.0), PACES[speeds]) == pytest.approx(rate, abs=0.006)


@pytest.mark.parametrize("speeds", PACES)
def test_ad_psgd_moves_the_mean_at_the_learning_rate(speeds):
    assert mean_rate(ADPSGD(), PACES[speeds], Links(0.03, 1e4)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("compressor", [None, TopK(ratio=0.25)])
def test_dc_gossip_in_lockstep_preserves_the_mean(compressor):
    algorithm = DCGossip(0.3, **({"compressor": compressor} if compressor else {}), lambda0=0.0, max_staleness=0)
    assert mean_rate(algorithm, [1, 1, 1, 1], Links(0.03, 1e4)) == pytest.approx(1, abs=1e-12)
