"""1-bit Adam: Adam on the mean gradient until its variance is known, then compressed momentum over that variance.

    g_k = grad F_k(x)
    t <= freeze_step:  g = sum_k w_k g_k, uncompressed
                       m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g
    t > freeze_step:   p_k = beta1 m + (1 - beta1) g_k + e_k
                       q_k = C(p_k);  e_k = p_k - q_k                        each rank
                       p = sum_k w_k q_k + e;  m = C_down(p);  e = p - m     the server: a star's hub, a ring's ranks
    x = (1 - lr weight_decay) x - lr m / (sqrt(v) + epsilon)                 all ranks alike

x is the model (n,), the same on all ranks, and t the number of the step, from 1; F_k the loss of the batch of rank k;
m and v (n,) the moments, the same on all ranks; e_k (n,) the error memory of rank k and q_k its message; w_k what it
counts in the sum; e (n,) the error memory of the server, whose answer is m; C and C_down the compressors of both
directions; lr the learning rate. Products, roots and quotients are elementwise.

Adam's step is no linear function of the gradient, so errors of compressed gradients would not cancel in it; with v
frozen it is one of the momentum. A sign cannot say zero, and would be divided by epsilon where no gradient has come
before the freeze, so that ``m = v = 0``: such entries are sent as zero, and never move again. So freeze late enough
that every parameter that matters has had a gradient; the reference code's default is 100,000 steps. Signs also give
rare entries, of small v, as much momentum as all others of their tensor: in short runs an ``epsilon`` near the usual
size of a gradient holds them back. The study of images has ``epsilon = 1e-3`` for that reason, that of text 1e-4: with
the default of 1e-8, which is for a warm-up that is long enough to know v, some runs diverged.

Differences from the reference code (DeepSpeed): any compressor (its sign is scaled by the root mean square, ours by the
mean magnitude), tensor by tensor on request; a server for the whole vector instead of one for each piece of it; moments
are corrected for their start at zero, v as at the freeze (``bias_correction``); the code leaves such entries to a mask
that the user gives. APMSqueeze (Tang et al. 2020, arXiv 2008.11343) is the same method but for such details.

Wire: until the freeze a dense sum (see `mpicomp.exchange.sums.aggregate`), then as Efficient-Adam. Memory: the two
moments, ``e_k``, and ``e`` on servers. Tang et al. 2021, arXiv 2102.02888.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gossip = mpicomp.distribute(model, optimizer, OneBitAdam(SignNorm(), downlink=SignNorm()), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases
from mpicomp.algorithms.sums.adam import moments_, zero_moments
from mpicomp.algorithms.sums.two_way import TwoWayAdam, TwoWayState
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.state import MOMENT


@dataclass
class OneBitAdamState:
    """What a rank keeps.

    Attributes:
        m: (n,) first moment, the same on all ranks.
        v: (n,) second moment, the same on all ranks; after the freeze, 0 marks what does not move.
        messages: the errors, and the states of the compressors.
        steps: steps done.

    """

    m: Tensor = field(metadata=MOMENT)
    v: Tensor = field(metadata=MOMENT)
    messages: TwoWayState
    steps: int = 0


@dataclass(frozen=True)
class OneBitAdam(TwoWayAdam[OneBitAdamState]):
    """Adam whose variance is frozen, with compressed momentum.

    Attributes:
        freeze_step: the last step with an uncompressed gradient, at least 1; a tenth or more of the run.

    """

    freeze_step: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.freeze_step < 1:
            raise ConfigError(f"algorithm.freeze_step = {self.freeze_step} must be at least 1: v must be known")

    def init(self, local: Local, exchange: Exchange) -> OneBitAdamState:
        """Return moments and errors of zero, once the weights and the optimizer are found to fit."""
        messages = self.init_messages(local, exchange)
        return OneBitAdamState(*zero_moments(local), messages)

    def phases(self, local: Local, state: OneBitAdamState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        t = state.steps + 1
        yield None
        g = local.g
        if t <= self.freeze_step:
            Aggregator(exchange).mean_(g, self.rank_weights(exchange.size))
            moments_(state.m, state.v, g, self.beta1, self.beta2)
        else:
            self._agree_on_momentum(g, local, state, exchange)
        self.steps_of_(state.m, state.v, local, (t, min(t, self.freeze_step)))  # lr m / (sqrt(v) + epsilon), in g
        self.decay_(local)
        local.x.sub_(g)
        self.tell_optimizer(local)
        state.steps = t

    def _agree_on_momentum(self, g: Tensor, local: Local, state: OneBitAdamState, exchange: Exchange) -> None:
        """``m = C_down(...)`` of ``beta1 m + (1 - beta1) g_k``, 0 where v is; `g` is g_k, whose content is lost."""
        messages, is_idle = state.messages, state.v == 0
        torch.lerp(g, state.m, self.beta1, out=g).masked_fill_(is_idle, 0.0)
        answer = self.agree(g, local, messages, exchange)
        self.downlink.accumulate(answer, local.spec, g.zero_())
        state.m.copy_(g)
        for vector in (state.m, messages.uplink.residual, messages.server_error):
            if vector.numel():
                vector.masked_fill_(is_idle, 0.0)

    def diagnostics(self, local: Local, state: OneBitAdamState) -> dict[str, float]:
        """Return ``error_norm``, |e_k|, and on servers ``server_error_norm``, |e|."""
        return self.error_norms(state.messages)
