"""EF-SGD: the sum of compressed gradients, with an error memory and the momentum of each rank for itself.

    g_k = grad F_k(x)
    u_k = mu u_k + g_k                                     local momentum (u_k = g_k for mu = 0)
    p_k = (lr' / lr) e_k + u_k                             lr' of the step before
    q_k = C(p_k);  e_k = p_k - q_k
    b = mu b + lambda x                                    weight decay, with the same momentum
    x = x - lr u(sum_k w_k q_k + b)                        on all ranks alike

x is the model (n,), the same on all ranks; F_k the loss of the batch of rank k; u_k (n,) its momentum and mu the
parameter ``momentum``; e_k (n,) its error memory, what it has not sent so far; C the compressor and q_k what is sent;
w_k what rank k counts in the sum; lr the learning rate of each parameter and lambda its weight decay, both of the
optimizer; b (n,) is the same on all ranks; u() the direction that the optimizer makes of the sum.

This is the form of the papers, which keep ``E_k = lr e_k`` in the unit of a parameter:

    P_k = E_k + lr u_k;  Q_k = C(P_k);  E_k = P_k - Q_k;  x = x - sum_k w_k Q_k

So what was left out moves the model by the rate of the step that it belongs to, however the rate has changed until it
is sent. The two are equal for all compressors with ``C(a p) = a C(p)``, which are all but those with a threshold or
values of 16 bits; a threshold is one of p_k, in the unit of a gradient. What is sent stays in that unit, so that the
optimizer can make any direction of the sum; where the rate is constant, nothing is scaled. A step at a rate of zero
adds no gradient to p_k, and what it sends is lost.

Weight decay is not compressed: the optimizer adds it on all ranks alike, and b gives it the momentum of the gradients.
Decoupled weight decay, as AdamW's, is no part of a gradient and has no b.
Without compression this is SGD with momentum and weight decay on the mean gradient. The papers have none; the code for
DEF (Xu et al., ``anxuthu/DEF``) adds it to g_k, ahead of the compression, which is the same up to errors. With weight
decay made a part of g_k, the trajectories are those of that code (recorded, compared to 2e-6).

``error_average`` makes e_k LoCo's moving average of the errors (see `mpicomp.algorithms.sums.error_memory`);
with ``smallest_ratio`` the ratio of C changes (see `mpicomp.algorithms.sums.ratio_control`).

``overlap`` delays the last line by one step (see `mpicomp.algorithms.sums.base`); a message then moves the model by the
rate of the step in which it arrives. The control for GMC and DGC: momentum before the compression, from the own
gradients alone.

Wire: see `mpicomp.exchange.sums.aggregate`. Memory: ``e``, and ``u`` with momentum, and ``b`` with weight decay, too;
``error_average`` and ``smallest_ratio`` one vector more each.
Stich et al. 2018, arXiv 1809.07599; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, EFSGD(TopK(ratio=0.01), momentum=0.9), topology=star)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction
from mpicomp.algorithms.sums.base import (
    add_decay_momentum_,
    decay_momentum,
    require_no_momentum,
)
from mpicomp.algorithms.sums.error_memory import ErrorMemory, ErrorMemorySum
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import IN_FLIGHT, MOMENT


@dataclass
class EFSGDState:
    """What a rank keeps.

    Attributes:
        feedback: the error memory (n,), and the state of the compressor.
        rates: the learning rate in whose unit e_k is, of each part of ``Local.groups``.
        velocity: (n,) the sum of the own gradients; None without momentum.
        decay: (n,) the momentum b of the weight decay; None without momentum, or without weight decay at the start.
        delayed: (nbytes,) uint8, the message of the last step; None without overlap.
        steps: messages formed.

    """

    feedback: ErrorMemory
    rates: list[float]
    velocity: Tensor | None = field(metadata=MOMENT)
    decay: Tensor | None = field(metadata=MOMENT)
    delayed: Tensor | None = field(metadata=IN_FLIGHT)
    steps: int = 0


@dataclass(frozen=True)
class EFSGD(ErrorMemorySum[EFSGDState]):
    """SGD on sums of compressed gradients.

    Attributes:
        momentum: mu in [0, 1), of each rank for itself.

    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(momentum=self.momentum)

    def init(self, local: Local, exchange: Exchange) -> EFSGDState:
        """Return an error memory and a momentum of zero."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        if self.momentum:
            require_no_momentum("EF-SGD", local)
        feedback = self.init_memory(local, exchange)
        velocity = torch.zeros_like(local.x) if self.momentum else None
        rates = [float(group["lr"]) for _, group in local.groups]
        decay = decay_momentum("EF-SGD", local, self.momentum)
        return EFSGDState(feedback, rates, velocity, decay, self.init_delayed(local))

    def phases(self, local: Local, state: EFSGDState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        if self.momentum:
            require_no_momentum("EF-SGD", local)
        delayed = self.start_delayed_sum(local, state, exchange)
        yield delayed.test if delayed else None
        u = local.g  # u_k
        if state.velocity is not None:
            u = state.velocity.mul_(self.momentum).add_(u)
        self._add_(u, local, state)  # p_k, in the place of e_k
        self.update_with_delayed_sum(delayed, local, state)
        q = self.compress_sum(local, state)  # q_k and e_k
        self.sum_and_update(q, local, state, exchange)

    def follow_rates(self, local: Local, state: EFSGDState) -> None:
        """``e_k = (lr' / lr) e_k``, in the unit of a gradient at the rate of now."""
        groups, rates, e = local.groups, state.rates, state.feedback.residual
        if len(groups) != len(rates):
            raise ConfigError(
                f"the optimizer's groups are now {len(groups)} parts of the model, and were {len(rates)}: EF-SGD keeps "
                "the learning rate of each part, so arrange the groups before training"
            )
        for i, (part, group) in enumerate(groups):
            if (lr := float(group["lr"])) and lr != rates[i]:
                e[part].mul_(rates[i] / lr)
                rates[i] = lr

    def _add_(self, u: Tensor, local: Local, state: EFSGDState) -> None:
        """``p_k = (lr' / lr) e_k + u_k``, in the place of e_k."""
        self.follow_rates(local, state)
        self.keep_error(state)
        e = state.feedback.residual
        for part, group in local.groups:
            if group["lr"]:
                e[part].add_(u[part])

    def update(self, local: Local, state: EFSGDState) -> None:
        """Take the optimizer's step with the sum in ``local.g`` and the momentum of the weight decay."""
        if state.decay is not None:
            add_decay_momentum_(local, state.decay, self.momentum)
        local.update()
