"""Sequential SGD: one rank, no communication. The reference to which the others are compared.

    g = grad F(x)
    x = x - lr u(g)

x is the model (n,), F the loss of a batch, lr the learning rate, and u(g) the direction that the optimizer makes of the
gradient g, with its momentum and weight decay.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, SGD(), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.base import Algorithm, Local, Phases
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule


@dataclass(frozen=True)
class SGD(Algorithm[None]):
    """Plain training of one rank with any optimizer."""

    def check(self, schedule: Schedule) -> None:
        """Raise ConfigError if there is more than one rank: they would never talk."""
        if schedule.size > 1:
            raise ConfigError(
                f"algorithm.kind = 'sgd' is for one rank, not {schedule.size}: start one process, "
                "or use 'ssgd' (all-reduce) or 'local_sgd'."
            )

    def init(self, local: Local, exchange: Exchange) -> None:
        """Return None: nothing is kept from step to step."""

    def phases(self, local: Local, state: None, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        yield None
        local.update()
