"""SparseLoCo: many steps alone, then one outer step along the sum of what is compressed of them, with an error memory.

    theta_k = phi
    repeat H times:  g_k = grad F_k(theta_k);  theta_k = theta_k - lr u_k
    p_k = beta e_k + phi - theta_k
    q_k = C(p_k);  e_k = p_k - q_k
    phi = phi - alpha sum_k w_k q_k                  on all ranks alike

theta_k is the model (n,) of rank k and F_k the loss of its batch; phi (n,) the slow model, the same on all ranks; lr
the learning rate; u_k the direction that the inner optimizer makes of g_k, whose state is kept and never exchanged; H
the parameter ``period``; e_k (n,) the error memory, what the rank has not sent so far, and beta ``error_decay``, what
of it stays until the next outer step; C the compressor and q_k what is sent; w_k what rank k counts in the sum, also
where it has not sent a coordinate; alpha ``outer_lr``. There is no outer momentum: the error memory takes its place.

p_k has the unit of a parameter, so the learning rate enters once, in the local steps. Without compression e_k stays
zero, and this is DiLoCo with eta = alpha and no momentum.

Wire: see `mpicomp.exchange.sums.aggregate`, every H steps. Memory: ``phi`` and ``e``. Sarfi et al. 2025,
arXiv 2508.15706: H = 15 or 30, AdamW inside, and 3.1 % of each chunk of 64 x 64 with 2 bits a value, which is
``block_topk`` with ``ratio = 0.03125`` and ``values = "statistical"``. Large runs have outer_lr = 0.65 later on.

In a script:

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    gossip = mpicomp.distribute(model, optimizer, SparseLoCo(BlockTopK(0.03125, values="statistical")), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction, require_period, require_positive
from mpicomp.algorithms.sums.base import AggregatedAlgorithm
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator


@dataclass
class SparseLoCoState:
    """What a rank keeps.

    Attributes:
        phi: (n,) the slow model.
        feedback: the error memory (n,), and the state of the compressor.
        step: the number of steps done, which tells when to exchange.

    """

    phi: Tensor
    feedback: FeedbackState
    step: int = 0


@dataclass(frozen=True)
class SparseLoCo(AggregatedAlgorithm[SparseLoCoState]):
    """Local steps of any optimizer, and an outer step along a sum of compressed moves.

    Attributes:
        period: H, the steps from one outer step to the next.
        outer_lr: alpha, > 0.
        error_decay: beta, in [0, 1).

    """

    ranks_stay_equal: ClassVar[bool] = False

    period: int = 15
    outer_lr: float = 1.0
    error_decay: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        require_period(self.period)
        require_positive(outer_lr=self.outer_lr)
        require_fraction(error_decay=self.error_decay)

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the slow model."""
        return True

    def init(self, local: Local, exchange: Exchange) -> SparseLoCoState:
        """Return the slow model, which is that of the start, and an error memory of zero."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        feedback = ErrorFeedback(self.compressor).init(local.spec, local.x.device, exchange.rank)
        return SparseLoCoState(local.x.clone(), feedback)

    def phases(self, local: Local, state: SparseLoCoState, exchange: Exchange) -> Phases:
        """Take a local step, and after every `period` of them the outer one, in the order of the module's docstring."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            self._outer_step(local, state, exchange)

    def _outer_step(self, local: Local, state: SparseLoCoState, exchange: Exchange) -> None:
        phi, spec, weights = state.phi, local.spec, self.rank_weights(exchange.size)
        moved = torch.sub(phi, local.x, out=local.x)  # the model is phi from here on
        state.feedback.residual.mul_(self.error_decay).add_(moved)  # p_k, in the place of e_k
        q = ErrorFeedback(self.compressor).compress_sum(spec, state.feedback)  # q_k and e_k
        Aggregator(exchange).average_(q, self.compressor, spec, local.x, weights)
        phi.sub_(local.x, alpha=self.outer_lr)
        local.x.copy_(phi)

    def diagnostics(self, local: Local, state: SparseLoCoState) -> dict[str, float]:
        """Return ``error_norm``, |e|."""
        return {"error_norm": float(state.feedback.residual.norm())}
