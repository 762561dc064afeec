"""GMC and GMC+: compressed gradients with the global momentum, the last step of the model that all ranks share.

    x~ = x_t - lambda lr e_k                               detached point of GMC+; lambda = 0 is GMC
    p_k = e_k - (beta / lr) (x_t - x_{t-1})                global momentum, in the unit of a gradient; beta = 0 where
                                                           lr is below a hundredth of the largest so far
    g_k = grad F_k(x~);  p_k = p_k + g_k
    q_k = C(p_k);  e_k = p_k - q_k
    x_{t+1} = x_t - lr sum_k w_k q_k                       by the optimizer, on all ranks alike

x_t is the model (n,) before step t, the same on all ranks; F_k the loss of the batch of rank k; e_k (n,) its error
memory, what it has not sent so far; lambda the parameter ``detachment`` and beta the parameter ``momentum``; lr the
learning rate; C the compressor and q_k what is sent; w_k what rank k counts in the sum.

Without compression this is heavy-ball momentum on the mean gradient (tested to 1e-12). What is compressed contains the
step that all ranks have made together, where DGC and EF-SGD with momentum know the own gradients only: that is to help
most where the data of the ranks differ. A change of the learning rate keeps the size of the last step and not its unit
(heavy-ball convention; torch's SGD scales it), and leaves e as it is. So what e holds of the momentum would be worth
too much when a small lr rises again: while lr is below a hundredth of the largest so far, there is no momentum,
beta = 0. Groups of parameters with rates of their own are judged by the largest of their own.

``overlap`` (see `mpicomp.algorithms.sums.base`) delays the gradient alone. The momentum is formed when the sum of the
last message has come and has moved the model, so it is the newest step of the model that the message contains, and the
sums ``Q_t = sum_k w_k q_k`` of step t obey the same recursion:

    g_k = grad F_k(x~) at x~ of x_t, while the messages of the last step travel;  p_k = e_k + g_k
    x_{t+1} = x_t - lr Q_{t-1}
    p_k = p_k - (beta / lr) (x_{t+1} - x_t)
    q_k = C(p_k);  e_k = p_k - q_k

Without compression this is heavy ball on gradients that are one step old, ``x_{t+1} = x_t - lr g_{t-1} + beta (x_t -
x_{t-1})`` with the mean gradient g_{t-1} of step t - 1. A change of the learning rate then scales the momentum as
torch's SGD does: the rate of the step that a message will make is not known when it is formed.

Zhao et al., arXiv 1905.12948. The listing is from memory of the paper and of its identities, not from code. How GMC+
detaches (after DEF, Xu and Huang) could not be compared with the paper: it scales the momentum term as GMC does, and
lambda = 0.3 is that of the scripts of DEF's authors. With ``momentum = 0`` it goes where the code for DEF goes
(recorded, compared to 2e-6), also when g_k is made the momentum of rank k, which DEF has in the place of the global.
Treat ``detachment`` beside the global momentum as unverified.

A frozen parameter makes no steps, so its global momentum begins at zero when it is thawed; its e_k waits.

``error_average`` makes e_k LoCo's moving average of the errors (see `mpicomp.algorithms.sums.error_memory`);
with ``smallest_ratio`` the ratio of C changes (see `mpicomp.algorithms.sums.ratio_control`).

The model that is evaluated and stored is x_t, which all ranks hold, with ``detachment`` too. DEF's code
(``anxuthu/DEF``) evaluates ``x_t - lr sum_k w_k e_k`` with equal w_k instead, the model once all that was left out has
been sent, and goes on from x_t. Here checkpoint, export and evaluation are of one model, and none takes a dense sum of
errors; so figures of GMC+ may differ from those of that code. That code also multiplies e by the rate of its step, as
EF-SGD here does, which makes a difference where the rate decays; and it adds weight decay to g_k, at x~ and ahead of
the compression, where it is the optimizer's here.

Wire: see `mpicomp.exchange.sums.aggregate`. Memory: ``e`` and ``x_{t-1}``; ``error_average`` and
``smallest_ratio`` one vector more each.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, GMC(TopK(ratio=0.01), momentum=0.9), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction
from mpicomp.algorithms.gossip.base import divisors
from mpicomp.algorithms.sums.base import require_minimizing, require_no_momentum
from mpicomp.algorithms.sums.error_memory import ErrorMemory, ErrorMemorySum
from mpicomp.compression.wrap.feedback import ErrorFeedback
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import IN_FLIGHT


@dataclass
class GMCState:
    """What a rank keeps.

    Attributes:
        feedback: the error memory (n,), and the state of the compressor.
        previous: (n,) the model of the step before; with overlap, room for the last step of the model.
        largest_lr: of each part of ``Local.groups``, the largest learning rate so far.
        delayed: (nbytes,) uint8, the message of the last step; None without overlap.
        steps: messages formed.

    """

    feedback: ErrorMemory
    previous: Tensor
    largest_lr: list[float]
    delayed: Tensor | None = field(metadata=IN_FLIGHT)
    steps: int = 0


@dataclass(frozen=True)
class GMC(ErrorMemorySum[GMCState]):
    """Global momentum compression.

    Attributes:
        momentum: beta in [0, 1).
        detachment: lambda in [0, 1] of GMC+, unverified beside a momentum; 0 for GMC.

    """

    momentum: float = 0.9
    detachment: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(momentum=self.momentum)
        if not 0 <= self.detachment <= 1:
            raise ConfigError(f"algorithm.detachment = {self.detachment} must be in [0, 1]")

    @property
    def begins_before_gradient(self) -> bool:
        """Whether messages travel behind the gradient, or it is computed at the detached point."""
        return self.overlap or self.moves_model_for_gradient

    @property
    def moves_model_for_gradient(self) -> bool:
        """Whether there is a detached point, as in GMC+."""
        return self.detachment > 0

    @property
    def keeps_anchor(self) -> bool:
        """Whether the momentum is the step from the model before to the one that the step begins with."""
        return self.momentum > 0 and not self.overlap

    def init(self, local: Local, exchange: Exchange) -> GMCState:
        """Return an error of zero, and the model as that of the step before: there is no momentum yet."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        require_no_momentum("GMC", local)
        require_minimizing("GMC", local)
        largest_lr = [0.0] * len(local.groups)
        return GMCState(self.init_memory(local, exchange), local.x.clone(), largest_lr, self.init_delayed(local))

    def phases(self, local: Local, state: GMCState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        require_no_momentum("GMC", local)
        feedback, x, previous = ErrorFeedback(self.compressor), local.x, state.previous
        delayed = self.start_delayed_sum(local, state, exchange)
        detached = self._detached_point(local, state) if self.detachment else None
        self.keep_error(state)
        if not self.overlap:
            self._add_momentum_(local, state)  # of x_t - x_{t-1}
        previous.copy_(x)
        if detached is not None:
            x.copy_(detached)
            detached = None  # not to be held while the gradient is computed
        yield delayed.test if delayed else None
        x.copy_(previous)
        feedback.add_(local.g, state.feedback)  # p_k, in the place of e_k
        self.update_with_delayed_sum(delayed, local, state)
        if self.overlap:
            self._add_momentum_(local, state)  # of x_{t+1} - x_t
        q = self.compress_sum(local, state)  # q_k and e_k
        self.sum_and_update(q, local, state, exchange)

    def _detached_point(self, local: Local, state: GMCState) -> Tensor:
        """Return ``x~ = x_t - lambda lr e_k`` (n,)."""
        point = state.feedback.residual.clone()
        for part, group in local.groups:
            torch.sub(local.x[part], point[part].mul_(self.detachment * group["lr"]), out=point[part])
        return point

    def _add_momentum_(self, local: Local, state: GMCState) -> None:
        """``p_k = p_k - (beta / lr) (x - previous)``, where lr is not too small; the content of `previous` is lost."""
        step = state.previous.sub_(local.x)
        for (part, _), lr in zip(local.groups, divisors(local, state.largest_lr), strict=True):
            if lr:
                state.feedback.residual[part].add_(step[part], alpha=self.momentum / lr)
