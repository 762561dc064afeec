"""Synchronous SGD: the gradients of all ranks are averaged by an all-reduce. The uncompressed baseline.

    g_i = grad F_i(x)
    g = (1/N) sum_i g_i
    x = x - lr u(g)

x is the model (n,), the same on all N ranks; F_i the loss of the batch of rank i; lr the learning rate; u(g) the
direction that the optimizer makes of g, with its momentum and weight decay.

Wire: ``2 (N - 1) / N`` vectors sent a rank and step (ring all-reduce). MPI chooses the order of summation, so results
agree with the loopback to rounding, not bit for bit; so does NCCL, which adds up inside nodes where each rank has a GPU
(`mpicomp.exchange.node_sums`). The graph is not used.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, SSGD(), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpicomp.algorithms.base import Algorithm, Local, Phases
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule


@dataclass(frozen=True)
class SSGD(Algorithm[None]):
    """All-reduce SGD, what DistributedDataParallel computes."""

    ranks_stay_equal: ClassVar[bool] = True
    updates_with_sum: ClassVar[bool] = True

    def check(self, schedule: Schedule) -> None:
        """Take any graph: the all-reduce does not use it."""

    def init(self, local: Local, exchange: Exchange) -> None:
        """Return None: nothing is kept from step to step."""

    def phases(self, local: Local, state: None, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        yield None
        exchange.mean_(local.g)
        local.update()
