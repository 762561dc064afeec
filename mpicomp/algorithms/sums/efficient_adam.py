"""Efficient-Adam: each rank's own Adam step, compressed on the way to a server and on the way back.

    g_k = grad F_k(x)
    m_k = beta1 m_k + (1 - beta1) g_k;  v_k = theta_t v_k + (1 - theta_t) g_k g_k
    z_k = alpha_t m_k / (sqrt(v_k) + epsilon)
    p_k = z_k + e_k
    q_k = C(p_k);  e_k = p_k - q_k                         each rank
    p = sum_k w_k q_k + e;  q = C_down(p);  e = p - q      the server: the hub of a star, every rank of a ring
    x = (1 - lr_t weight_decay) x - q                      all ranks alike; the model itself is never sent

x is the model (n,), the same on all ranks, and t the number of the step, from 1; F_k the loss of the batch of rank k;
m_k and v_k (n,) its moments, z_k its step of Adam, e_k (n,) its error memory and q_k its message; w_k what it counts in
the sum; e (n,) the error memory of the server and q its answer; C and C_down the compressors of both directions.
Products, roots and quotients are elementwise. lr_t is the learning rate, alpha_t the same with Adam's bias correction
in it (``bias_correction``, off in the paper's listing), and theta_t is ``beta2``. ``rates = "decaying"`` takes those of
the theory instead, ``lr_t = alpha_t = lr / sqrt(t)`` and ``theta_t = 1 - beta2 / t``.

Moments are each rank's own and never sent: without compression this is the mean of the ranks' Adam steps, and *not*
Adam on the mean gradient. Where the ranks' gradients differ by more than their noise, its fixed point is not the
optimum of the mean: without noise each rank's step is near a sign, and the model goes to the median of the ranks'
optima (tested). Deal the samples at random. Errors are in the unit of a parameter, so a change of the learning rate
does not touch them.

The paper compresses tensor by tensor (``per_tensor``). The listing follows its abstract; quantizers and the schedules
of the theory are from memory, the place of weight decay is ours.

Wire: star: a worker one message, the hub one answer to each worker; ring: ``size - 1`` messages a rank. Memory: the two
moments, ``e_k``, and ``e`` on servers. Chen et al. 2023, arXiv 2205.14473, IEEE TSP 71.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gossip = mpicomp.distribute(model, optimizer, EfficientAdam(LogGrid(2), downlink=UniformGrid(4)), topology=star)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from mpicomp.algorithms.base import Local, Phases
from mpicomp.algorithms.sums.adam import moments_, zero_moments
from mpicomp.algorithms.sums.two_way import TwoWayAdam, TwoWayState
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import MOMENT

Rates = Literal["constant", "decaying"]


@dataclass
class EfficientAdamState:
    """What a rank keeps.

    Attributes:
        m: (n,) first moment of the own gradients.
        v: (n,) second moment of the own gradients.
        messages: the errors, and the states of the compressors.
        steps: steps done.

    """

    m: Tensor = field(metadata=MOMENT)
    v: Tensor = field(metadata=MOMENT)
    messages: TwoWayState
    steps: int = 0


@dataclass(frozen=True)
class EfficientAdam(TwoWayAdam[EfficientAdamState]):
    """Adam with compression and error memories in both directions.

    Attributes:
        rates: ``"constant"``, or ``"decaying"`` as in the theory, where `beta2` in (0, 1) is its theta.

    """

    rates: Rates = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates not in get_args(Rates):
            raise ConfigError(
                f"algorithm.rates = {self.rates!r} must be one of {', '.join(map(repr, get_args(Rates)))}"
            )
        if self.rates == "decaying" and self.bias_correction:
            raise ConfigError(
                "algorithm.bias_correction = true is for a constant beta2; with algorithm.rates = 'decaying' set it to "
                "false"
            )

    def init(self, local: Local, exchange: Exchange) -> EfficientAdamState:
        """Return moments and errors of zero, once the weights and the optimizer are found to fit."""
        messages = self.init_messages(local, exchange)
        return EfficientAdamState(*zero_moments(local), messages)

    def phases(self, local: Local, state: EfficientAdamState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        t = state.steps + 1
        scale, theta = 1.0, self.beta2
        if self.rates == "decaying":
            scale, theta = 1 / t**0.5, 1 - self.beta2 / t
        yield None
        moments_(state.m, state.v, local.g, self.beta1, theta)
        self.steps_of_(state.m, state.v, local, (t, t), scale)  # z_k, in the place of g_k
        q = self.agree(local.g, local, state.messages, exchange)
        self.decay_(local, scale)
        self.downlink.accumulate(q, local.spec, local.x, -1.0)
        self.tell_optimizer(local)
        state.steps = t

    def diagnostics(self, local: Local, state: EfficientAdamState) -> dict[str, float]:
        """Return ``error_norm``, |e_k|, and on servers ``server_error_norm``, |e|."""
        return self.error_norms(state.messages)
