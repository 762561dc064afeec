"""Synchronous SGD: the gradients of all ranks are averaged by an all-reduce. The uncompressed baseline.

    g_i = grad F_i(x);  g = (1/N) sum_i g_i;  x = x - lr u(g)

Wire: ``2 (N - 1) / N`` vectors sent a rank and step (ring all-reduce). MPI chooses the order of summation, so results
agree with the loopback to rounding, not bit for bit. The graph is not used.
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
        """Take any graph: it is not used."""

    def init(self, local: Local, exchange: Exchange) -> None:
        """Keep nothing."""

    def phases(self, local: Local, state: None, exchange: Exchange) -> Phases:
        """Gradient, all-reduce, update."""
        yield None
        exchange.mean_(local.g)
        local.update()
