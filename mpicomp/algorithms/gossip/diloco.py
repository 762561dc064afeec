"""DiLoCo: many steps alone, then one outer step of all ranks along the mean of what they have moved.

    theta_i = phi
    repeat H times:  g_i = grad F_i(theta_i);  theta_i = theta_i - lr u_i
    d = (1/N) sum_i (phi - theta_i)                  the pseudo-gradient, an all-reduce
    v = beta v + d
    phi = phi - eta (d + beta v)                     Nesterov's; with ``nesterov = false``, phi = phi - eta v

theta_i is the model (n,) of rank i and F_i the loss of its batch; phi (n,) the slow model, the same on all N ranks; lr
the learning rate; u_i the direction that the inner optimizer makes of g_i, whose state is kept and never exchanged; H
the parameter ``period``; d (n,) the mean of what the ranks have moved and v (n,) its momentum; eta ``outer_lr`` and
beta ``outer_momentum``. All ranks start from the same phi.

With H = 1, eta = 1, beta = 0 and SGD inside, this is SGD on the mean gradient.

With ``inner``, a gossip method, no sum over all ranks is needed. Each rank takes the outer step of its own slow model
with its own momentum, and what follows is the mixing of ``inner``, with neighbors only:

    d_i = phi_i - theta_i;  v_i = beta v_i + d_i
    phi_i = mix(phi_i - eta (d_i + beta v_i))

The outer step is linear. So where ``mix`` preserves the mean over the ranks, the means of phi_i and v_i move as phi and
v do above, whatever the graph and the compressor: with D-PSGD on a complete graph this is DiLoCo; with CHOCO-SGD
compressed differences of the slow models travel. What is new is that the slow models differ, and that local steps start
from different places.

Wire: ``2 (N - 1) / N`` vectors sent a rank every H steps (ring all-reduce), on any graph. MPI chooses the order of
summation, so results agree with the loopback to rounding, not bit for bit. With ``inner``, its message to each neighbor
every H steps. Memory: ``phi``, and ``v`` with momentum, and that of ``inner``. Douillard et al. 2023,
arXiv 2311.08105, Algorithm 1: H = 500, eta = 0.7, beta = 0.9 and AdamW inside; 50 and 125 steps are used as well.

In a script:

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1)
    gossip = mpicomp.distribute(model, optimizer, DiLoCo(period=50), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, Phases, require_fraction, require_period, require_positive
from mpicomp.algorithms.gossip.base import Gossip, check_inner
from mpicomp.algorithms.outer_step import outer_step_
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.exchange.base import Exchange
from mpicomp.state import State
from mpicomp.topology.base import Schedule


@dataclass
class DiLoCoState:
    """What a rank keeps.

    Attributes:
        phi: (n,) the slow model.
        v: (n,) the momentum of the pseudo-gradients; None without.
        inner: state of the inner algorithm; None for an all-reduce.
        step: the number of steps done, which tells when to exchange.

    """

    phi: Tensor
    v: Tensor | None
    inner: State
    step: int = 0


@dataclass(frozen=True)
class DiLoCo(Algorithm[DiLoCoState]):
    """Local steps of any optimizer, and an outer step with momentum.

    Attributes:
        period: H, the steps from one outer step to the next.
        outer_lr: eta, > 0.
        outer_momentum: beta, in [0, 1).
        nesterov: whether the outer step looks ahead along its momentum; else it is heavy-ball momentum.
        inner: how slow models are mixed, a gossip method that does not send behind a gradient; None for the mean over
            all ranks.

    """

    period: int = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    nesterov: bool = True
    inner: Gossip[Any] | None = None

    def __post_init__(self) -> None:
        require_period(self.period)
        require_positive(outer_lr=self.outer_lr)
        require_fraction(outer_momentum=self.outer_momentum)
        if self.inner is not None:
            check_inner(self.inner)

    @property
    def compressor(self) -> Compressor:
        """That of the inner algorithm; an all-reduce is not compressed."""
        return self.inner.compressor if self.inner else Identity()

    def check(self, schedule: Schedule) -> None:
        """Need what the inner algorithm needs; the all-reduce does not use the graph."""
        if self.inner is not None:
            self.inner.check(schedule)

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the slow model."""
        return True

    @property
    def tolerates_loss(self) -> bool:
        """Whether there is an inner algorithm that does; an all-reduce does not."""
        return self.inner is not None and self.inner.tolerates_loss

    def skip(self, state: DiLoCoState) -> None:
        """Count the step, and the mixing if there is one in it."""
        state.step += 1
        if self.inner is not None and state.step % self.period == 0:
            self.inner.skip(state.inner)

    def init(self, local: Local, exchange: Exchange) -> DiLoCoState:
        """Return the slow model, which is that of the start, and a momentum of zero."""
        v = torch.zeros_like(local.x) if self.outer_momentum else None
        return DiLoCoState(local.x.clone(), v, self.inner.init(local, exchange) if self.inner else None)

    def phases(self, local: Local, state: DiLoCoState, exchange: Exchange) -> Phases:
        """Take a local step, and after every `period` of them the outer one, in the order of the module's docstring."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            self._outer_step(local, state, exchange)

    def _outer_step(self, local: Local, state: DiLoCoState, exchange: Exchange) -> None:
        phi = state.phi
        d = torch.sub(phi, local.x, out=local.x)  # the model is phi from here on
        if self.inner is None:
            exchange.mean_(d)
        outer_step_(phi, state.v, d, self.outer_lr, self.outer_momentum, self.nesterov)
        local.x.copy_(phi)
        if self.inner is not None:
            self.inner.mix(local, state.inner, exchange)
            phi.copy_(local.x)

    def diagnostics(self, local: Local, state: DiLoCoState) -> dict[str, float]:
        """Those of the inner algorithm."""
        return self.inner.diagnostics(local, state.inner) if self.inner else {}
