"""DeepSqueeze: the compressed model itself is sent, with an error memory and no public copies.

    g_i = grad F_i(x_i)
    y_i = x_i - lr u_i
    v_i = y_i + e_i;  q_i = C(v_i);  e_i = v_i - q_i       send q_i to every neighbor, receive q_j
    x_i = y_i + gamma (sum_j W_ij q_j - q_i)               (j = i included)

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; y_i the model after that local step; e_i (n,) the error
memory, what has not been sent so far; C the compressor and q_i what is sent; W_ij the weight of rank j in the average
of rank i; gamma the consensus step.

There is nothing that neighbors must agree on, so the graph may vary and a lost message does no lasting harm: q_i takes
the place of the q_j that is lost. The messages do not vanish at consensus, so the ranks stay a distance apart that
grows with gamma, and training diverges if gamma is too large; ``gamma = "auto"`` measures a step in training
(`mpicomp.algorithms.gossip.automatic_step`). The mean over ranks is preserved, unless one of the two messages of an
edge is lost alone, or lost messages have left two ranks with another gamma until the next window. Wire: one compressed
message, the same to every neighbor. Memory: ``e``. Tang et al. 2019, arXiv 1907.07346, Algorithm 1.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, DeepSqueeze(0.02, TopK(ratio=0.1)), topology=OnePeerExponential)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, require_bounded_errors
from mpicomp.algorithms.gossip.automatic_step import (
    AutomaticStep,
    Gamma,
    check_gamma,
    layout_with_delta,
    without_delta,
)
from mpicomp.algorithms.gossip.base import Gossip, lost_weight
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.exchange.base import Exchange
from mpicomp.state import State


@dataclass
class DeepSqueezeState:
    """What a rank keeps.

    Attributes:
        e: (n,) what compression has left out so far.
        compressor: state of the compressor.
        automatic: what finds gamma; None where it is given.
        step: the number of steps done, which picks the graph of a varying schedule.

    """

    e: Tensor
    compressor: State
    automatic: AutomaticStep | None
    step: int = 0


@dataclass(frozen=True)
class DeepSqueeze(Gossip[DeepSqueezeState]):
    """DeepSqueeze with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0, dimensionless, or ``"auto"``.
        compressor: any contractive compressor, without `ErrorFeedback`, which is part of the method.

    """

    gamma: Gamma
    compressor: Compressor = Identity()

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        require_bounded_errors("DeepSqueeze", self.compressor)

    @property
    def tolerates_loss(self) -> bool:
        """Yes: what is sent is the model, not a change of a copy that the neighbors have."""
        return True

    def skip(self, state: DeepSqueezeState) -> None:
        """Count the step; the error memory stays as it is."""
        state.step += 1
        if state.automatic:
            state.automatic.hear(())

    def init(self, local: Local, exchange: Exchange) -> DeepSqueezeState:
        """Return an error memory of zero."""
        compressor = self.compressor.init(local.spec, local.x.device, exchange.rank)
        automatic = None
        if self.gamma == "auto":
            # Half: the ranks stay apart by about gamma |e|.
            automatic = AutomaticStep.start(exchange.schedule, self.compressor, local.spec, local.x.device, caution=2.0)
        return DeepSqueezeState(torch.zeros_like(local.x), compressor, automatic)

    def mix(self, local: Local, state: DeepSqueezeState, exchange: Exchange) -> None:
        """Exchange the models, compressed, and move towards them."""
        rank, topology, spec = exchange.rank, exchange.schedule(state.step), local.spec
        automatic = state.automatic
        v = state.e.add_(local.x)
        if automatic and automatic.measures:
            wanted, apart = automatic.sample(v), automatic.sample(local.x)
        message = own = self.compressor.compress(v, spec, state.compressor)
        layout = self.compressor.layout(spec)
        if automatic:
            message, layout = automatic.with_delta(own), layout_with_delta(layout)
        arrived = exchange.start(message, layout, topology).wait()
        gamma = float(self.gamma) if automatic is None else automatic.gamma
        lost = lost_weight(topology, rank, arrived)
        # x first: with Identity `own` is v itself, which becomes e in place.
        self.compressor.accumulate(own, spec, local.x, gamma * (topology.weight(rank, rank) + lost - 1))
        self.compressor.accumulate(own, spec, state.e, -1.0)
        for source, payload in arrived.items():
            self.compressor.accumulate(without_delta(payload), spec, local.x, gamma * topology.weight(rank, source))
        if automatic:
            if automatic.measures:
                automatic.measure(wanted, automatic.sample(state.e), apart)
            automatic.hear(arrived.values())
        state.step += 1

    def diagnostics(self, local: Local, state: DeepSqueezeState) -> dict[str, float]:
        """Return the ``gamma`` that was found."""
        return {"gamma": state.automatic.gamma} if state.automatic else {}
