"""The contract of algorithms over the loopback: training works, the state can be stored, restarts are exact."""

import pytest
import torch
from support import small
from support.methods import ALL_REDUCE, DETERMINISTIC

from mpicomp import kernels
from mpicomp.algorithms import SGP
from mpicomp.exchange import loopback
from mpicomp.topology import random_digraph

METHODS = {**DETERMINISTIC, **ALL_REDUCE}


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", METHODS)
def test_loss_falls_and_ranks_agree(name, size):
    def serve(world):
        gossip, closure = small.make(world, METHODS[name])
        losses = [float(gossip.step(closure(step))) for step in range(60)]
        return losses, gossip.consensus_distance(), float(gossip.local.x.norm())

    for losses, distance, norm in loopback.run(size, serve):
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        assert distance < 0.5 * norm


ON_DIGRAPHS = [(name, 5, random_digraph) for name, method in METHODS.items() if isinstance(method, SGP)]


@pytest.mark.parametrize(("name", "size", "topology"), [*((name, 3, None) for name in METHODS), *ON_DIGRAPHS])
def test_restart_is_exact(name, size, topology):
    """6 steps, store, restore into new objects, 6 steps = 12 steps, bit for bit."""
    small.assert_restart_is_exact(METHODS[name], topology, size)


@pytest.mark.parametrize("name", METHODS)
def test_runs_are_the_same_with_compiled_kernels_and_with_their_definitions(name, monkeypatch):
    """Bit for bit: parameters, losses and bytes. Where there are no compiled ones, it is the same run again."""
    fast = loopback.run(3, small.train, METHODS[name])
    monkeypatch.setattr(kernels, "compiled", lambda device: None)
    for (x, loss, sent), (x2, loss2, sent2) in zip(fast, loopback.run(3, small.train, METHODS[name]), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(loss, loss2)
        assert sent == sent2
