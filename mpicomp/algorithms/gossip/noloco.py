"""NoLoCo: many steps alone, then an outer step with one random partner; no sum over all ranks.

    theta_i = phi_i
    repeat H times:  g_i = grad F_i(theta_i);  theta_i = theta_i - lr u_i
    d_i = theta_i - phi_i                            send d_i and phi_i to the partner j, receive d_j and phi_j
    delta_i = alpha delta_i + beta (d_i + d_j) / 2 - gamma (phi_i - (phi_i + phi_j) / 2)
    phi_i = phi_i + delta_i

theta_i is the model (n,) of rank i and F_i the loss of its batch; phi_i (n,) its slow model; lr the learning rate; u_i
the direction that the inner optimizer makes of g_i, whose state is kept and never exchanged; H the parameter
``period``; d_i (n,) what the rank has moved; delta_i (n,) the outer step with its momentum; alpha
``outer_momentum``, beta ``outer_lr``; gamma the consensus step, which draws the slow models of a pair together.

Pairs are drawn anew for each outer step. With an odd number of ranks one of them has no partner, and steps alone:
its means are d_i and phi_i. So does a rank whose partner's message is lost. If none is, the mean of phi_i over the
ranks moves as in DiLoCo with heavy-ball momentum, alpha and beta. The slow models stay apart by what local steps of the
learning rate add in a period; as it falls, they meet.
The sign of d_i is that of the authors' code (their paper prints another one beside the same definition).

With a compressor C that loses something, a pair exchanges twice:

    p_i = rho e_i + d_i;  q_i = C(p_i);  e_i = p_i - q_i               send q_i, receive q_j
    s = the coordinates where q_i or q_j is not 0                      send phi_i[s] in half the bytes, receive phi_j[s]
    delta_i = alpha delta_i + beta (q_i + q_j) / 2 - gamma (phi_i - (phi_i + phi_j) / 2)[s]

e_i (n,) is the error memory, what the rank has not sent so far, and rho ``error_decay``, what of it stays until the
next outer step. Random partners have no public copies of each other that could tell how far their slow models are
apart. But these come apart only where messages have moved them, so a pair compares them where one of its two messages
does. What one of them has moved with an earlier partner is compared when that coordinate is sent again. The mean over
the ranks is as above, with q_i for d_i. Messages that add up what earlier ones left out do the work of a momentum: take
alpha = 0. phi_i[s] travels as float16 if the model is float32, as float32 if it is float64; entries beyond what that
holds (65,504 in float16) are not compared. This form is this package's own.

Wire: every H steps, to one partner, two dense vectors; compressed, q_i and half of an entry's bytes for each coordinate
of s. Memory: ``phi`` and ``delta``; compressed, ``e``, too. Kolehmainen et al. 2025, arXiv 2506.10911.

In a script:

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    gossip = mpicomp.distribute(model, optimizer, NoLoCo(period=50), topology=RandomMatching)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.algorithms.base import (
    Algorithm,
    Local,
    Phases,
    require_bounded_errors,
    require_fraction,
    require_period,
    require_positive,
)
from mpicomp.algorithms.gossip.base import lost_weight
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.errors import TopologyError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule, Topology

_HALF = {torch.float32: torch.float16, torch.float64: torch.float32}


@dataclass
class NoLoCoState:
    """What a rank keeps.

    Attributes:
        phi: (n,) the slow model.
        delta: (n,) the last outer step, for its momentum.
        feedback: the error memory (n,), and the state of the compressor; None without compression.
        step: the number of steps done, which tells when to exchange, and picks the pairs.

    """

    phi: Tensor
    delta: Tensor
    feedback: FeedbackState | None = None
    step: int = 0


@dataclass(frozen=True)
class NoLoCo(Algorithm[NoLoCoState]):
    """Local steps of any optimizer, and an outer step with a random partner.

    Attributes:
        period: H, the steps from one outer step to the next.
        outer_lr: beta, > 0.
        outer_momentum: alpha, in [0, 1).
        gamma: consensus step, > 0.
        compressor: of what a rank has moved; any contractive one, without `ErrorFeedback`, which is part of the method.
        error_decay: rho, in [0, 1); without meaning if there is no compressor.

    """

    period: int = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.5
    gamma: float = 0.7
    compressor: Compressor = Identity()
    error_decay: float = 0.95

    def __post_init__(self) -> None:
        require_period(self.period)
        require_positive(outer_lr=self.outer_lr, gamma=self.gamma)
        require_fraction(outer_momentum=self.outer_momentum, error_decay=self.error_decay)
        require_bounded_errors("NoLoCo", self.compressor)

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` pairs the ranks, anew for each step if there are more than two."""
        graph = schedule(0)
        if not graph.is_symmetric or any(len(graph.sources(rank)) > 1 for rank in range(graph.size)):
            why = "does not consist of disjoint pairs"
        elif isinstance(schedule, Topology) and schedule.size > 2:
            why = "stays as it is, and pairs that never change agree with no other"
        else:
            return
        raise TopologyError(
            f"topology.kind = {schedule.name!r} {why}: NoLoCo steps with one partner at a time. Use topology.kind = "
            "'random_matching'; on other graphs, algorithm.kind = 'diloco' with algorithm.inner = 'dpsgd' or 'choco'."
        )

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the slow model."""
        return True

    @property
    def tolerates_loss(self) -> bool:
        """Without compression: a rank that hears nothing from its partner steps alone; else the two must agree on s."""
        return self.compressor.is_lossless

    def skip(self, state: NoLoCoState) -> None:
        """Count the step."""
        state.step += 1

    def init(self, local: Local, exchange: Exchange) -> NoLoCoState:
        """Return the slow model, which is that of the start, an outer step and an error memory of zero."""
        feedback = None
        if not self.compressor.is_lossless:
            feedback = ErrorFeedback(self.compressor).init(local.spec, local.x.device, exchange.rank)
        return NoLoCoState(local.x.clone(), torch.zeros_like(local.x), feedback)

    def phases(self, local: Local, state: NoLoCoState, exchange: Exchange) -> Phases:
        """Take a local step, and after every `period` of them the outer one, in the order of the module's docstring."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            topology = exchange.schedule(state.step // self.period - 1)
            moved = local.x.sub_(state.phi)  # the model is phi from here on
            state.delta.mul_(self.outer_momentum)
            if state.feedback is None:
                self._meet(moved, state, exchange, topology)
            else:
                self._meet_compressed(moved, local.spec, state, state.feedback, exchange, topology)
            state.phi.add_(state.delta)
            local.x.copy_(state.phi)

    def _meet(self, moved: Tensor, state: NoLoCoState, exchange: Exchange, topology: Topology) -> None:
        """Add beta times the mean of what both have moved, and the step towards the partner's phi, to delta."""
        phi, delta, rank = state.phi, state.delta, exchange.rank
        layout = Layout(tuple(Field(name, phi.dtype, phi.numel()) for name in ("d", "phi")))
        pending = exchange.start({"d": moved, "phi": phi}, layout, topology)
        delta.add_(moved, alpha=self.outer_lr * topology.weight(rank, rank))
        arrived = pending.wait()
        if lost := lost_weight(topology, rank, arrived):
            delta.add_(moved, alpha=self.outer_lr * lost)
        for source, message in arrived.items():
            weight = topology.weight(rank, source)
            delta.add_(message["d"], alpha=self.outer_lr * weight)
            delta.add_(message["phi"] - phi, alpha=self.gamma * weight)

    def _meet_compressed(
        self,
        moved: Tensor,
        spec: Spec,
        state: NoLoCoState,
        feedback: FeedbackState,
        exchange: Exchange,
        topology: Topology,
    ) -> None:
        """Do as `_meet`, with the messages for the moves, and phi where one is not 0; `moved` is used up."""
        phi, delta, rank, compressor = state.phi, state.delta, exchange.rank, self.compressor
        feedback.residual.mul_(self.error_decay)
        own = ErrorFeedback(compressor).compress(moved, spec, feedback)
        pending = exchange.start(own, compressor.layout(spec), topology)
        is_sent = torch.zeros_like(moved, dtype=torch.bool)

        def add(message: Payload, weight: float) -> None:
            decoded = moved.zero_()
            compressor.accumulate(message, spec, decoded)
            delta.add_(decoded, alpha=self.outer_lr * weight)
            is_sent.logical_or_(decoded != 0)

        add(own, topology.weight(rank, rank))
        arrived = pending.wait()
        for source, message in arrived.items():
            add(message, topology.weight(rank, source))
        if not arrived:
            return  # no partner in this outer step
        places = is_sent.nonzero().view(-1)  # the same on both
        half = _HALF[phi.dtype]
        largest = torch.finfo(half).max
        values = phi[places].clamp_(-largest, largest).to(half)
        layout = Layout((Field("phi", values.dtype, values.numel()),))
        for source, message in exchange.start({"phi": values}, layout, topology).wait().items():
            apart = message["phi"].to(phi.dtype) - values.to(phi.dtype)  # rounded on both sides: the mean is preserved
            delta.index_add_(0, places, apart, alpha=self.gamma * topology.weight(rank, source))
