"""EF-SGD: the sum of compressed gradients, with an error memory and the momentum of each rank for itself.

    g_k = grad F_k(x)
    u_k = mu u_k + g_k                                     local momentum (u_k = g_k for mu = 0)
    p_k = e_k + u_k
    q_k = C(p_k);  e_k = p_k - q_k
    x = x - lr u(sum_k w_k q_k)                            on all ranks alike

x is the model (n,), the same on all ranks; F_k the loss of the batch of rank k; u_k (n,) its momentum and mu the
parameter ``momentum``; e_k (n,) its error memory, what it has not sent so far; C the compressor and q_k what is sent;
w_k what rank k counts in the sum; lr the learning rate; u() the direction that the optimizer makes of the sum.

``overlap`` delays the last line by one step (see `mpicomp.algorithms.sums.base`).

The error is in the unit of a gradient, so a change of the learning rate does not touch it. The control for GMC and DGC:
momentum before the compression, from the own gradients alone.

Wire: see `mpicomp.exchange.sums.aggregate`. Memory: ``e``, and ``u`` with momentum. Stich et al. 2018,
arXiv 1809.07599; Karimireddy et al. 2019, arXiv 1901.09847, Algorithm 2.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, EFSGD(TopK(ratio=0.01), momentum=0.9), topology=star)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases
from mpicomp.algorithms.sums.base import GradientSum, require_momentum, require_no_momentum
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.exchange.base import Exchange
from mpicomp.state import IN_FLIGHT


@dataclass
class EFSGDState:
    """What a rank keeps.

    Attributes:
        feedback: the error memory (n,), and the state of the compressor.
        velocity: (n,) the sum of the own gradients; None without momentum.
        delayed: (nbytes,) uint8, the message of the last step; None without overlap.
        steps: messages formed.

    """

    feedback: FeedbackState
    velocity: Tensor | None
    delayed: Tensor | None = field(metadata=IN_FLIGHT)
    steps: int = 0


@dataclass(frozen=True)
class EFSGD(GradientSum[EFSGDState]):
    """SGD on sums of compressed gradients.

    Attributes:
        momentum: mu in [0, 1), of each rank for itself.

    """

    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_momentum(self.momentum)

    def init(self, local: Local, exchange: Exchange) -> EFSGDState:
        """Return an error memory and a momentum of zero."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        if self.momentum:
            require_no_momentum("EF-SGD", local)
        feedback = ErrorFeedback(self.compressor).init(local.spec, local.x.device, exchange.rank)
        velocity = torch.zeros_like(local.x) if self.momentum else None
        return EFSGDState(feedback, velocity, self.init_delayed(local))

    def phases(self, local: Local, state: EFSGDState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        feedback = ErrorFeedback(self.compressor)
        delayed = self.start_delayed_sum(local, state, exchange)
        yield delayed.test if delayed else None
        u = local.g  # u_k
        if state.velocity is not None:
            u = state.velocity.mul_(self.momentum).add_(u)
        feedback.add_(u, state.feedback)  # p_k, in the place of e_k
        self.update_with_delayed_sum(delayed, local)
        q = feedback.compress_sum(local.spec, state.feedback)  # q_k and e_k
        self.sum_and_update(q, local, state, exchange)

    def diagnostics(self, local: Local, state: EFSGDState) -> dict[str, float]:
        """Return ``error_norm``, |e|."""
        return {"error_norm": float(state.feedback.residual.norm())}
