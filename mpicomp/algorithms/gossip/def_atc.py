"""DEF-ATC: differential error feedback, adapt then combine; compressed differences with a memory of what was left out.

Like CHOCO-SGD, a rank sends the compressed difference of its model to a public copy; like DeepSqueeze, it adds to the
next message what compression left out of this one. The model itself is then made of public copies alone.

    g_i = grad F_i(x_i)
    y_i = x_i - lr u_i                               adapt
    v_i = y_i - xhat_i + e_i
    q_i = C(v_i);  e_i = v_i - q_i                   send q_i to every neighbor, receive q_j
    xhat_i = xhat_i + zeta q_i
    s_i = s_i + zeta sum_j W_ij q_j                  (j = i included; s_i = sum_j W_ij xhat_j)
    x_i = xhat_i + gamma (s_i - xhat_i)              combine

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; y_i the model after that local step; xhat_i the public copy
of the model, and e_i the error memory; C the compressor and q_i what is sent; zeta the parameter ``damping``; W_ij the
weight of rank j in the average of rank i, 0 unless they are neighbors; s_i the weighted sum of the public copies; gamma
the consensus step.

The error memory holds what a rank knows and its neighbors do not, so a step that was too small to be sent is not lost.
Without compression and with gamma = zeta = 1 this is D-PSGD. With a constant learning rate the mean-square error is of
the order of the learning rate, as it is without compression. With zeta = 1 the mean over ranks of ``x_i + e_i`` moves
by that of the local steps, and mixing preserves it. zeta < 1 damps compressors whose error grows with the message, and
shortens every local step by that factor.

The model is a combination of public copies, so these start as the common initial model, and e_i as 0. The paper starts
with x_i = xhat_i = e_i = 0; a public copy of 0 beside another model would replace it by its first message.

In every step the model comes back to public copies, without what was not sent, which e_i brings later. So what is
written into the model after every step comes into e_i every time, until it is sent, and then moves xhat_i by many times
as much. Weights that are clamped, pruned or normalized after every step make the method diverge where messages leave
out most of the model, as top-k of 5 % does: use CHOCO-SGD, whose model keeps what was not sent. The e_i of a frozen
parameter waits until it is thawed.

The paper mixes in any subspace; here it is that of equal models. The paper's symbols are psi for y, phi for xhat, z for
e, mu for lr. The recursion follows a summary of the paper, not its text.

Wire: one compressed message, the same to every neighbor. Memory: ``xhat``, ``s`` and ``e``, whatever the degree. Needs
symmetric doubly stochastic weights on a fixed connected graph. Nassif et al. 2024, arXiv 2406.18418.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gossip = mpicomp.distribute(model, optimizer, DEFATC(gamma=0.2, compressor=TopK(ratio=0.1)), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import (
    Local,
    require_bounded_errors,
    require_fixed_symmetric,
    require_positive,
    require_share,
)
from mpicomp.algorithms.gossip.base import Gossip
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.exchange.base import Exchange
from mpicomp.state import ERROR_OF_GRADIENTS, PUBLIC_COPY, State
from mpicomp.topology.base import Schedule


@dataclass
class DEFATCState:
    """What a rank keeps.

    Attributes:
        x_hat: (n,) the public copy of the own model.
        s: (n,) sum of the public copies of the neighborhood, weighted by the own row of W, the own copy included.
        e: (n,) what compression has left out so far.
        compressor: state of the compressor.

    """

    x_hat: Tensor = field(metadata=PUBLIC_COPY)
    s: Tensor = field(metadata=PUBLIC_COPY)
    e: Tensor = field(metadata=ERROR_OF_GRADIENTS)
    compressor: State


@dataclass(frozen=True)
class DEFATC(Gossip[DEFATCState]):
    """DEF-ATC with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0, dimensionless.
        compressor: any compressor, without `ErrorFeedback`, which is part of the method.
        damping: zeta in (0, 1], the part of a message by which the public copies move.

    """

    gamma: float
    compressor: Compressor = Identity()
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        require_bounded_errors("DEF-ATC", self.compressor)
        require_share(damping=self.damping)

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
        require_fixed_symmetric("DEF-ATC", schedule)

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the public copy, which the model is made of."""
        return True

    def init(self, local: Local, exchange: Exchange) -> DEFATCState:
        """Return the model as the public copy, and an error memory of zero: all ranks start with one model."""
        compressor = self.compressor.init(local.spec, local.x.device, exchange.rank)
        x_hat, s = local.x.clone(), local.x.clone()  # the rows of W sum to one
        return DEFATCState(x_hat, s, torch.zeros_like(x_hat), compressor)

    def mix(self, local: Local, state: DEFATCState, exchange: Exchange) -> None:
        """Send the difference with what was left out, and combine the public copies."""
        rank, topology, spec = exchange.rank, exchange.schedule(0), local.spec
        v = state.e.add_(local.x).sub_(state.x_hat)
        own = self.compressor.compress(v, spec, state.compressor)
        pending = exchange.start(own, self.compressor.layout(spec), topology)
        self.compressor.accumulate(own, spec, state.x_hat, self.damping)
        self.compressor.accumulate(own, spec, state.s, self.damping * topology.weight(rank, rank))
        # The error last: with Identity `own` is v itself, which becomes e in place.
        self.compressor.accumulate(own, spec, state.e, -1.0)
        for source, payload in pending.wait().items():
            self.compressor.accumulate(payload, spec, state.s, self.damping * topology.weight(rank, source))
        local.x.copy_(state.x_hat)
        kernels.mix_(local.x, state.s, state.x_hat, self.gamma)

    def diagnostics(self, local: Local, state: DEFATCState) -> dict[str, float]:
        """Return ``compression_error``, |e| / |x|, which grows without end if gamma is too large."""
        return {"compression_error": float(state.e.norm() / local.x.norm().clamp_min(1e-30))}
