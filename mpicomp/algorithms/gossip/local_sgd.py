"""Local SGD: several steps alone, then one averaging of the models.

    repeat H times:  g_i = grad F_i(x_i);  x_i = x_i - lr u_i
    x_i = sum_j W_ij x_j                             send x_i to every neighbor, receive x_j (j = i included)

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; H the parameter ``period``; W_ij the weight of rank j in the
average of rank i.

On ``topology.kind = "complete"`` this is local SGD as published; on a sparser graph it is its decentralized form.
Wire: one dense vector to each neighbor every H steps. Stich 2019, arXiv 1805.09767, Algorithm 1.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, LocalSGD(period=8), topology=complete)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.base import Algorithm, Local, Phases
from mpicomp.algorithms.gossip.dpsgd import DPSGD, combine_, start
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange


@dataclass
class LocalSGDState:
    """The number of steps done, which tells when to average."""

    step: int = 0


@dataclass(frozen=True)
class LocalSGD(Algorithm[LocalSGDState]):
    """Periodic averaging.

    Attributes:
        period: H, the steps from one averaging to the next.

    """

    period: int = 4

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ConfigError(f"algorithm.period = {self.period} must be at least 1: the steps between averagings")

    def init(self, local: Local, exchange: Exchange) -> LocalSGDState:
        """Return a count of no steps: the first averaging comes after `period` of them."""
        return LocalSGDState()

    def phases(self, local: Local, state: LocalSGDState, exchange: Exchange) -> Phases:
        """Take a local step, and average after every `period` of them."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            topology = exchange.schedule(state.step // self.period - 1)
            averaging = DPSGD()
            combine_(local, start(local, exchange, topology, averaging.compressor), exchange, topology, averaging)
