"""Local SGD: several steps alone, then one averaging of the models.

    repeat H times:  x_i = x_i - lr u_i
    x_i = sum_j W_ij x_j

On ``topology.kind = "complete"`` this is local SGD as published; on a sparser graph it is its decentralized form.
Wire: one dense vector to each neighbor every H steps. Stich 2019, arXiv 1805.09767, Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpicomp.algorithms.base import Algorithm, Local, Phases
from mpicomp.algorithms.gossip.dpsgd import DPSGD, DPSGDState, combine_, start
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
        """Start at step 0."""
        return LocalSGDState()

    def phases(self, local: Local, state: LocalSGDState, exchange: Exchange) -> Phases:
        """Take a local step, and average after every `period` of them."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            topology = exchange.schedule(state.step // self.period - 1)
            averaging = DPSGD()
            pending = start(local, DPSGDState(None), exchange, topology, averaging.compressor)
            combine_(local, pending, exchange, topology, averaging)
