"""A small model with batch norm on a fixed problem, trained through the drop-in."""

import copy

import torch
from support.methods import graph_for
from torch import nn

from mpicomp.algorithms.sums.adam import OwnAdam
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.replica.distributed import Distributed
from mpicomp.state import TORCH_GENERATOR

CENTERS = torch.randn(3, 6, generator=torch.Generator().manual_seed(99))


def network(seed=0) -> nn.Module:
    with TORCH_GENERATOR, torch.random.fork_rng():
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.4
    return model


def batch(step, rank):
    """Return the inputs and the labels of a rank in a step."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    labels = torch.randint(3, (16,), generator=draw)
    return CENTERS[labels] + 0.3 * torch.randn(16, 6, generator=draw), labels


def make(world, algorithm, topology=None, seed=0, **options) -> tuple[Distributed, callable]:
    """Return a model under `algorithm`, and a function that gives the closure of a step."""
    model = network(seed)
    has_own_momentum = getattr(algorithm, "quasi_global_momentum", 0) or getattr(algorithm, "momentum", 0)
    takes_own_steps = isinstance(algorithm, OwnAdam)
    momentum = 0.0 if has_own_momentum or takes_own_steps else 0.9
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=1e-3)
    gossip = distribute(model, optimizer, algorithm, topology or graph_for(algorithm), world=world, **options)

    def closure(step):
        inputs, labels = batch(step, world.rank)
        return lambda: nn.functional.cross_entropy(model(inputs), labels)

    return gossip, closure


def train(world, algorithm, steps=10, topology=None):
    """Train and return the flat parameters, the last loss and the bytes sent."""
    gossip, closure = make(world, algorithm, topology)
    loss = torch.tensor(0.0)
    for step in range(steps):
        loss = gossip.step(closure(step))
    return gossip.local.x.clone(), loss, gossip.bytes_sent


def assert_restart_is_exact(algorithm, topology=None, size=3, store_after=6, steps=12):
    """Assert that storing, restoring into new objects and going on gives the bits of a run that is not interrupted."""

    def stored(world):
        gossip, closure = make(world, algorithm, topology)
        for step in range(steps):
            if step == store_after:
                saved = copy.deepcopy(gossip.state_dict())
            gossip.step(closure(step))
        return saved, gossip.local.x.clone(), gossip.bytes_sent

    def resumed(world, saved):
        gossip, closure = make(world, algorithm, topology, seed=1)
        gossip.load_state_dict(saved[world.rank])
        for step in range(store_after, steps):
            gossip.step(closure(step))
        return gossip.local.x, gossip.bytes_sent

    first = loopback.run(size, stored)
    second = loopback.run(size, resumed, [saved for saved, _, _ in first])
    for (_, x, sent), (x_resumed, sent_resumed) in zip(first, second, strict=True):
        assert torch.equal(x, x_resumed)
        assert sent == sent_resumed
