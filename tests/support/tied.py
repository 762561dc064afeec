"""A small language model whose head is its embedding, with a norm between, trained through the drop-in."""

import torch
from torch import nn

from mpicomp.algorithms import DPSGD
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring


class Tied(nn.Module):
    """Tokens (n,) to logits (n, 7)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.middle = nn.Linear(4, 4)
        self.again = self.middle  # a module with two names
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.again(self.middle(self.norm(self.embedding(tokens)))))


def train(world, steps=3):
    """Return a `Distributed` after some steps on which every rank has its own tokens."""
    torch.manual_seed(world.rank)
    model = Tied()
    gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), DPSGD(), ring, world=world)
    for step in range(steps):
        gossip.step(closure(model, world.rank, step))
    return gossip


def closure(model, rank, step):
    """Return the closure of a step of `model`."""
    tokens = torch.randint(7, (8,), generator=torch.Generator().manual_seed(100 * step + rank))
    return lambda: nn.functional.cross_entropy(model(tokens), tokens.roll(1))
