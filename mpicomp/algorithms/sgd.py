"""Sequential SGD: one rank, no communication. The reference to which the others are compared.

g = grad F(x);  x = x - lr u(g)          (u: the optimizer's direction)
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
        """Refuse more than one rank: they would never talk."""
        if schedule.size > 1:
            raise ConfigError(
                f"algorithm.kind = 'sgd' is for one rank, not {schedule.size}: start one process, "
                "or use 'ssgd' (all-reduce) or 'local_sgd'."
            )

    def init(self, local: Local, exchange: Exchange) -> None:
        """Keep nothing."""

    def phases(self, local: Local, state: None, exchange: Exchange) -> Phases:
        """Gradient, then update."""
        yield None
        local.update()
