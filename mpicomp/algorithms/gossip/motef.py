"""MoTEF and BEER: gradient tracking with compression, for ranks whose data differ.

Every rank keeps an estimate of the mean gradient over all ranks, and gossips it as CHOCO-SGD does the model. So its
step vanishes at the optimum of all ranks, not at its own, and a constant learning rate leads there; D-PSGD and
CHOCO-SGD stay a distance away that grows with the learning rate and with how much the data differ.

    g_i = grad F_i(x_i)
    m_i' = (1 - lambda) m_i + lambda g_i                     (at first m_i' = v_i = g_i)
    v_i = v_i + gamma (r_i - vhat_i) + m_i' - m_i;  m_i = m_i'
    x_i = x_i + gamma (s_i - xhat_i) - lr u(v_i)
    q_i = C(x_i - xhat_i);  p_i = C(v_i - vhat_i)            send both to every neighbor, receive q_j and p_j
    xhat_i = xhat_i + q_i;  s_i = s_i + sum_j W_ij q_j
    vhat_i = vhat_i + p_i;  r_i = r_i + sum_j W_ij p_j       (j = i included)

x_i is the model (n,) of rank i and F_i the loss of its batch; m_i a moving average of its gradients and lambda the
weight of the new one; v_i the estimate of the mean gradient; lr the learning rate; u() the direction that the
optimizer makes of v_i; C the compressor, q_i and p_i what is sent; xhat_i and vhat_i the public copies of model and
estimate; W_ij the weight of rank j in the average of rank i; s_i and r_i the weighted sums of the public copies; gamma
the consensus step.

The mean of v over the ranks is the mean of m in every step, and the mean of x moves by the mean of the steps. lambda =
1 is BEER. Without compression and with gamma = 1 this is gradient tracking.

Wire: one message with two compressed vectors, the same to every neighbor: twice CHOCO-SGD's bytes. Memory: m, v, two
public copies, two sums and two scratch vectors. ``gamma = "auto"`` finds a step for x and one for v
(`mpicomp.algorithms.gossip.automatic_step`). Needs symmetric doubly stochastic weights on a fixed connected graph and
a contractive C. The public copies of v start at 0. Huang et al. 2024, arXiv 2405.20114; Zhao et al. 2022, arXiv
2201.13320 (BEER).

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gossip = mpicomp.distribute(model, optimizer, MoTEF(gamma=0.1, compressor=TopK(ratio=0.1)), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import (
    Algorithm,
    Local,
    Phases,
    require_bounded_errors,
    require_fixed_symmetric,
    require_share,
)
from mpicomp.algorithms.gossip.automatic_step import AutomaticStep, Gamma, check_gamma
from mpicomp.algorithms.gossip.choco import (
    ChocoState,
    Start,
    add_arrived_,
    automatic_step,
    compress_difference_,
    compression_error,
    initial_copies,
)
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Layout, Payload
from mpicomp.exchange.base import Exchange
from mpicomp.state import OWN, SCRATCH, State
from mpicomp.topology.base import Schedule


@dataclass
class MoTEFState(ChocoState):
    """What a rank keeps beside CHOCO's copies.

    Attributes:
        m: (n,) the moving average of the gradients.
        v: (n,) the estimate of the mean gradient.
        v_hat: (n,) the public copy of v.
        r: (n,) sum of the public copies of v in the neighborhood, weighted by the own row of W.
        tracking: state of the compressor of v.
        room: (n,) for the difference of v, while that of the model is in `scratch`.
        automatic_of_v: what finds the consensus step of v; None where it is given.
        has_begun: whether m and v hold gradients.

    """

    m: Tensor
    v: Tensor
    v_hat: Tensor = field(metadata=OWN)  # on new ranks 0, as at the start: the estimates are then sent anew
    r: Tensor = field(metadata=OWN)
    tracking: State
    room: Tensor = field(metadata=SCRATCH)
    automatic_of_v: AutomaticStep | None
    has_begun: bool = False


@dataclass(frozen=True)
class MoTEF(Algorithm[MoTEFState]):
    """Gradient tracking with compressed differences, with any optimizer as the step.

    Attributes:
        gamma: consensus step, > 0, dimensionless, or ``"auto"``.
        compressor: any contractive compressor.
        gradient_weight: lambda, of the new gradient in the moving average, in (0, 1]; 1 is BEER.
        start: as in `Choco`, for the public copies of the model.

    """

    gamma: Gamma
    compressor: Compressor = Identity()
    gradient_weight: float = 0.9
    start: Start = "model"

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        require_bounded_errors("MoTEF", self.compressor)
        require_share(gradient_weight=self.gradient_weight)

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
        require_fixed_symmetric("MoTEF", schedule)

    def init(self, local: Local, exchange: Exchange) -> MoTEFState:
        """Return the public copies of the model as `start` says, and zeros for the rest."""
        m, v, v_hat, r, room = (torch.zeros_like(local.x) for _ in range(5))
        return MoTEFState(
            **initial_copies(self.start, self.compressor, local, exchange),
            m=m,
            v=v,
            v_hat=v_hat,
            r=r,
            tracking=self.compressor.init(local.spec, local.x.device, exchange.rank),
            room=room,
            automatic=automatic_step(self.gamma, self.compressor, local, exchange),
            automatic_of_v=automatic_step(self.gamma, self.compressor, local, exchange),
        )

    def phases(self, local: Local, state: MoTEFState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        yield None
        if state.has_begun:
            news = torch.sub(local.g, state.m, out=state.scratch).mul_(self.gradient_weight)
            state.m.add_(news)
            kernels.mix_(state.v, state.r, state.v_hat, self._gamma(state.automatic_of_v))
            state.v.add_(news)
        else:
            state.m.copy_(local.g)
            state.v.copy_(local.g)
            state.has_begun = True
        local.g.copy_(state.v)
        kernels.mix_(local.x, state.s, state.x_hat, self._gamma(state.automatic))
        local.update()
        self._exchange(local, state, exchange)

    def _gamma(self, automatic: AutomaticStep | None) -> float:
        """Return the consensus step of now, of x or of v."""
        return float(self.gamma) if automatic is None else automatic.gamma

    def _exchange(self, local: Local, state: MoTEFState, exchange: Exchange) -> None:
        """Send both differences, and bring the public copies and their sums up to date."""
        compressor, spec = self.compressor, local.spec
        rank, topology = exchange.rank, exchange.schedule(0)
        parts = (
            (local.x, state.x_hat, state.s, state.compressor, state.scratch, state.automatic),
            (state.v, state.v_hat, state.r, state.tracking, state.room, state.automatic_of_v),
        )
        payload: Payload = {}
        layouts = []
        for i, (vector, copy, total, of_compressor, scratch, automatic) in enumerate(parts):
            own, message, layout = compress_difference_(
                compressor, vector, copy, total, spec, of_compressor, scratch, automatic
            )
            compressor.accumulate(own, spec, total, topology.weight(rank, rank))
            payload |= {f"{i}.{name}": tensor for name, tensor in message.items()}
            layouts.append(layout)
        arrived = exchange.start(payload, Layout.concatenate(layouts), topology).wait()
        for i, (_, _, total, _, _, automatic) in enumerate(parts):
            messages = {source: _part(message, i) for source, message in arrived.items()}
            add_arrived_(compressor, spec, total, exchange, messages, automatic)

    def diagnostics(self, local: Local, state: MoTEFState) -> dict[str, float]:
        """Return ``compression_error``, |x - xhat| / |x|, and ``tracking_error``, the same of v."""
        return {
            "compression_error": compression_error(local.x, state.x_hat, state.scratch),
            "tracking_error": compression_error(state.v, state.v_hat, state.scratch),
            **({"gamma": state.automatic.gamma} if state.automatic else {}),
        }


def _part(message: Payload, i: int) -> Payload:
    """Return message `i` of those whose layouts were concatenated."""
    prefix = f"{i}."
    return {name.removeprefix(prefix): tensor for name, tensor in message.items() if name.startswith(prefix)}
