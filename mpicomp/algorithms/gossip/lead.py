"""LEAD: a correction of every rank's step, learned from compressed differences, for ranks whose data differ.

Every rank learns a dual variable, which at the optimum of all ranks is minus its own gradient there. So its step
vanishes at that optimum, not at its own, and a constant learning rate leads there, as with MoTEF, but with the bytes
of CHOCO-SGD; D-PSGD and CHOCO-SGD stay a distance away.

    g_i = grad F_i(x_i)
    y_i = x_i - lr u_i - lr d_i
    q_i = C(y_i - h_i)                               send q_i to every neighbor, receive q_j
    r_i = b_i + sum_j W_ij q_j - q_i                 (j = i included)
    h_i = h_i + alpha q_i;  b_i = (1 - alpha) b_i + alpha r_i
    x_i = y_i + gamma / 2 r_i
    d_i = d_i - gamma / (2 lr) r_i

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; d_i the dual variable, at first 0, in the unit of a
gradient; y_i the model after that local step; C the compressor and q_i what is sent; h_i the public copy, at first the
model; W_ij the weight of rank j in the average of rank i; b_i = sum_j W_ij h_j - h_i, at first 0, and r_i the same of
h_j + q_j, which is what the ranks know of y_j; alpha the weight of what is new in the public copy, ``copy_weight``;
gamma the consensus step.

The sum of d over the ranks is 0 in every step, and the mean of x moves by the mean of the steps of the optimizers. At
rest d_i = -u_i, so the u_i add up to 0: with SGD, with momentum or without, that is the optimum. Adam divides by other
numbers on each rank, so with it the ranks agree elsewhere. The published method has u_i = g_i. d keeps its meaning when
lr changes. But d changes by r_i over lr, and what r_i holds of compression errors does not become less with lr: so d
stays as it is while lr is below a hundredth of the largest so far, or a rate that rises again would find d too large.
Groups of parameters with rates of their own are judged by the largest of their own.
The published first step, a gradient step of every rank alone, is left out: all ranks hold the same model at first.

Without compression this is, for any alpha, NIDS and exact diffusion with the weights M = I - gamma / 2 (I - W):
x_i' = sum_j M_ij (2 x_j - x_j^- - lr (u_j - u_j^-)), where ^- is of the step before.

Wire: one compressed message, the same to every neighbor, as CHOCO-SGD's. Memory: d, h, b and two scratch vectors. Needs
symmetric doubly stochastic weights on a fixed connected graph and an unbiased C: ``natural``, ``qsgd``, ``randk`` with
``unbiased``, or one that is nearly exact, such as ``cast``; the error of another would add up in d. gamma = 1 and alpha
= 0.5, as published, are for messages whose squared error is a small part of the square of the difference. Where it is
a multiple v of that, alpha must be below 2 / (1 + v), and gamma the smaller, the smaller lr is. Liu, Li, Wang, Tang and
Yan 2021, arXiv 2007.00232, Algorithm 1, from memory: no code of the authors' was found. What confirms it is the
identity with NIDS (Li, Shi and Yan 2019, arXiv 1704.07807) and that it reaches the optimum; both are tested.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    gossip = mpicomp.distribute(model, optimizer, LEAD(compressor=Natural()), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import (
    Algorithm,
    Local,
    Phases,
    require_fixed_symmetric,
    require_no_feedback,
    require_positive,
    require_share,
)
from mpicomp.algorithms.gossip.base import divisors
from mpicomp.algorithms.gossip.choco import compression_error
from mpicomp.algorithms.gossip.dpsgd import LARGEST_ERROR
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import OWN, PUBLIC_COPY, SCRATCH, State
from mpicomp.topology.base import Schedule


@dataclass
class LEADState:
    """What a rank keeps.

    Attributes:
        dual: (n,) d, the correction of the step, in the unit of a gradient.
        x_hat: (n,) h, the public copy of the own model.
        ahead: (n,) b, how far the weighted mean of the neighborhood's public copies is ahead of the own one.
        scratch: (n,) room for a difference.
        room: (n,) for r, while a message may lie in `scratch`.
        compressor: state of the compressor.
        largest_lr: of each part of `Local.groups`, the largest learning rate so far.

    """

    dual: Tensor = field(metadata=OWN)  # on new ranks 0, as at the start: it must add up to 0
    x_hat: Tensor = field(metadata=PUBLIC_COPY)
    ahead: Tensor = field(metadata=OWN)  # 0 where all public copies are equal
    scratch: Tensor = field(metadata=SCRATCH)
    room: Tensor = field(metadata=SCRATCH)
    compressor: State
    largest_lr: list[float]


@dataclass(frozen=True)
class LEAD(Algorithm[LEADState]):
    """Primal-dual steps with compressed differences, with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0, dimensionless.
        compressor: an unbiased compressor, or one that is nearly exact (`Compressor.relative_error`).
        copy_weight: alpha, of what is new in the public copy, in (0, 1].

    """

    gamma: float = 1.0
    compressor: Compressor = Identity()
    copy_weight: float = 0.5

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        require_no_feedback("LEAD", self.compressor)
        if not (self.compressor.is_unbiased or self.compressor.relative_error <= LARGEST_ERROR):
            raise ConfigError(
                f"compression.kind = {type(self.compressor).__name__!r} is biased as it is set, and with LEAD its "
                "errors would add up. Use compression.kind = 'natural' or 'qsgd', or 'randk' with "
                "compression.unbiased = true; or algorithm.kind = 'motef', for any compressor."
            )
        require_share(copy_weight=self.copy_weight)

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
        require_fixed_symmetric("LEAD", schedule)

    def init(self, local: Local, exchange: Exchange) -> LEADState:
        """Return the model as the public copy, and zeros for the rest: all ranks start with one model."""
        dual, ahead, scratch, room = (torch.zeros_like(local.x) for _ in range(4))
        compressor = self.compressor.init(local.spec, local.x.device, exchange.rank)
        return LEADState(dual, local.x.clone(), ahead, scratch, room, compressor, [0.0] * len(local.groups))

    def phases(self, local: Local, state: LEADState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        yield None
        x, dual = local.x, state.dual
        local.update()
        for part, group in local.groups:
            x[part].sub_(dual[part], alpha=group["lr"])
        r = self._exchange(local, state, exchange)
        x.add_(r, alpha=self.gamma / 2)
        for (part, _), lr in zip(local.groups, divisors(local, state.largest_lr), strict=True):
            if lr:
                dual[part].sub_(r[part], alpha=self.gamma / (2 * lr))

    def _exchange(self, local: Local, state: LEADState, exchange: Exchange) -> Tensor:
        """Send the difference, bring the public copies up to date, and return r in `state.room`."""
        compressor, spec = self.compressor, local.spec
        rank, topology = exchange.rank, exchange.schedule(0)
        own = compressor.compress(torch.sub(local.x, state.x_hat, out=state.scratch), spec, state.compressor)
        pending = exchange.start(own, compressor.layout(spec), topology)
        r = state.room.copy_(state.ahead)
        compressor.accumulate(own, spec, r, topology.weight(rank, rank) - 1)
        compressor.accumulate(own, spec, state.x_hat, self.copy_weight)
        for source, payload in pending.wait().items():
            compressor.accumulate(payload, spec, r, topology.weight(rank, source))
        state.ahead.lerp_(r, self.copy_weight)
        return r

    def diagnostics(self, local: Local, state: LEADState) -> dict[str, float]:
        """Return ``compression_error``, |x - h| / |x|, which grows without end if gamma is too large."""
        return {"compression_error": compression_error(local.x, state.x_hat, state.scratch)}
