"""Local SGD: several steps alone, then one mixing of the models.

    repeat H times:  g_i = grad F_i(x_i);  x_i = x_i - lr u_i
    x_i = mix(x_i)                       that of ``inner``; by default D-PSGD's, x_i = sum_j W_ij x_j

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; H the parameter ``period``; W_ij the weight of rank j in the
average of rank i, j = i included.

By default and on ``topology.kind = "complete"`` this is local SGD as published; on a sparser graph it is its
decentralized form. ``inner`` is any gossip method that mixes after its local step: with CHOCO-SGD, the model after H
steps is what is compared to the public copy, as in SPARQ-SGD (Singh et al. 2019, arXiv 1910.14280) without its trigger.

Wire: one message of ``inner`` to each neighbor every H steps; by default a dense vector. Memory: that of ``inner``.
Stich 2019, arXiv 1805.09767, Algorithm 1.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, LocalSGD(period=8), topology=complete)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpicomp.algorithms.base import Algorithm, Local, Phases, require_period
from mpicomp.algorithms.gossip.base import Gossip, check_inner
from mpicomp.algorithms.gossip.dpsgd import DPSGD
from mpicomp.compression.base import Compressor
from mpicomp.exchange.base import Exchange
from mpicomp.state import State
from mpicomp.topology.base import Schedule


@dataclass
class LocalSGDState:
    """What a rank keeps.

    Attributes:
        inner: state of the inner algorithm.
        step: the number of steps done, which tells when to mix.

    """

    inner: State
    step: int = 0


@dataclass(frozen=True)
class LocalSGD(Algorithm[LocalSGDState]):
    """Periodic mixing.

    Attributes:
        period: H, the steps from one mixing to the next.
        inner: how models are mixed: any gossip method that does not send behind a gradient.

    """

    period: int = 4
    inner: Gossip[Any] = DPSGD()

    def __post_init__(self) -> None:
        require_period(self.period)
        check_inner(self.inner)

    @property
    def compressor(self) -> Compressor:
        """That of the inner algorithm."""
        return self.inner.compressor

    def check(self, schedule: Schedule) -> None:
        """Need what the inner algorithm needs."""
        self.inner.check(schedule)

    @property
    def keeps_anchor(self) -> bool:
        """Whether the inner algorithm does."""
        return self.inner.keeps_anchor

    @property
    def tolerates_loss(self) -> bool:
        """Whether the inner algorithm does."""
        return self.inner.tolerates_loss

    def skip(self, state: LocalSGDState) -> None:
        """Count the step, and the mixing if there is one in it."""
        state.step += 1
        if state.step % self.period == 0:
            self.inner.skip(state.inner)

    def init(self, local: Local, exchange: Exchange) -> LocalSGDState:
        """Start the inner algorithm; its first mixing comes after `period` steps."""
        return LocalSGDState(self.inner.init(local, exchange))

    def phases(self, local: Local, state: LocalSGDState, exchange: Exchange) -> Phases:
        """Take a local step, and mix after every `period` of them."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            self.inner.mix(local, state.inner, exchange)

    def diagnostics(self, local: Local, state: LocalSGDState) -> dict[str, float]:
        """Those of the inner algorithm."""
        return self.inner.diagnostics(local, state.inner)
