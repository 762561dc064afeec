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

Wire: two dense vectors to one partner every H steps. Memory: ``phi`` and ``delta``. Kolehmainen et al. 2025,
arXiv 2506.10911.

In a script:

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4)
    gossip = mpicomp.distribute(model, optimizer, NoLoCo(period=50), topology=RandomMatching)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, Phases, require_fraction, require_period, require_positive
from mpicomp.algorithms.gossip.base import lost_weight
from mpicomp.compression.message import Field, Layout
from mpicomp.errors import TopologyError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule, Topology


@dataclass
class NoLoCoState:
    """What a rank keeps.

    Attributes:
        phi: (n,) the slow model.
        delta: (n,) the last outer step, for its momentum.
        step: the number of steps done, which tells when to exchange, and picks the pairs.

    """

    phi: Tensor
    delta: Tensor
    step: int = 0


@dataclass(frozen=True)
class NoLoCo(Algorithm[NoLoCoState]):
    """Local steps of any optimizer, and an outer step with a random partner.

    Attributes:
        period: H, the steps from one outer step to the next.
        outer_lr: beta, > 0.
        outer_momentum: alpha, in [0, 1).
        gamma: consensus step, > 0.

    """

    period: int = 50
    outer_lr: float = 0.7
    outer_momentum: float = 0.5
    gamma: float = 0.7

    def __post_init__(self) -> None:
        require_period(self.period)
        require_positive(outer_lr=self.outer_lr, gamma=self.gamma)
        require_fraction(outer_momentum=self.outer_momentum)

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
    def tolerates_loss(self) -> bool:
        """Yes: a rank that hears nothing from its partner steps alone."""
        return True

    def skip(self, state: NoLoCoState) -> None:
        """Count the step."""
        state.step += 1

    def init(self, local: Local, exchange: Exchange) -> NoLoCoState:
        """Return the slow model, which is that of the start, and an outer step of zero."""
        return NoLoCoState(local.x.clone(), torch.zeros_like(local.x))

    def phases(self, local: Local, state: NoLoCoState, exchange: Exchange) -> Phases:
        """Take a local step, and after every `period` of them the outer one, in the order of the module's docstring."""
        yield None
        local.update()
        state.step += 1
        if state.step % self.period == 0:
            self._outer_step(local, state, exchange)

    def _outer_step(self, local: Local, state: NoLoCoState, exchange: Exchange) -> None:
        phi, delta, rank = state.phi, state.delta, exchange.rank
        topology = exchange.schedule(state.step // self.period - 1)
        d = local.x.sub_(phi)  # the model is phi from here on
        layout = Layout(tuple(Field(name, phi.dtype, phi.numel()) for name in ("d", "phi")))
        pending = exchange.start({"d": d, "phi": phi}, layout, topology)
        delta.mul_(self.outer_momentum).add_(d, alpha=self.outer_lr * topology.weight(rank, rank))
        arrived = pending.wait()
        if lost := lost_weight(topology, rank, arrived):
            delta.add_(d, alpha=self.outer_lr * lost)
        for source, message in arrived.items():
            weight = topology.weight(rank, source)
            delta.add_(message["d"], alpha=self.outer_lr * weight)
            delta.add_(message["phi"] - phi, alpha=self.gamma * weight)
        phi.add_(delta)
        local.x.copy_(phi)
