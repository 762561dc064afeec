"""D-PSGD: averaging of whole models with the neighbors, uncompressed.

    adapt then combine:   g_i = grad F_i(x_i);  y_i = x_i - lr u_i
                          x_i = y_i + gamma (sum_j W_ij y_j - y_i)
    combine then adapt:   g_i = grad F_i(x_i), meanwhile the x_j travel
                          x_i' = x_i + gamma (sum_j W_ij x_j - x_i);  x_i = x_i' - lr u_i

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; y_i and x_i' are the model between the two halves of a step;
W_ij is the weight of rank j in the average of rank i, j = i included; gamma the diffusion rate.

The second order takes the gradient at the model before averaging, so the exchange runs behind forward and backward.
gamma = 1 is the published method; other values are a diffusion rate (the best for pure averaging is
``mpicomp.topology.spectral.best_diffusion_step``). Any graph whose weights are doubly stochastic, also directed or
varying.

Where the message of rank j is lost, x_i (or y_i) takes its place in the sum. If the two messages of an edge are lost
equally often, W stays symmetric in expectation; but the mean over ranks moves whenever one of them is lost alone.

Wire: one dense vector to each neighbor and step; `Cast` halves it. Lian et al. 2017, arXiv 1705.09056, Algorithm 1.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, DPSGD(order="combine_then_adapt"), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpicomp.algorithms.base import Local, Phases, require_positive
from mpicomp.algorithms.gossip.base import RegroupingGossip, lost_weight
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.state import State

LARGEST_ERROR = 2**-8
"""What a message may change of an entry, relative to it: as much as bfloat16 does."""


@dataclass
class DPSGDState:
    """What a rank keeps.

    Attributes:
        compressor: state of the compressor.
        step: the number of steps done, which picks the graph of a varying schedule.

    """

    compressor: State
    step: int = 0


@dataclass(frozen=True)
class DPSGD(RegroupingGossip[DPSGDState]):
    """Decentralized parallel SGD.

    Attributes:
        order: whether the local step comes before the averaging, or overlaps it.
        gamma: diffusion rate, > 0; 1 replaces the model by the weighted average.
        compressor: `Identity`, `Cast` or another that is nearly exact (`Compressor.relative_error`): with a lossier
            message of the model itself, without error memory, it does not converge.

    """

    order: Literal["adapt_then_combine", "combine_then_adapt"] = "adapt_then_combine"
    gamma: float = 1.0
    compressor: Compressor = Identity()

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        if self.compressor.relative_error > LARGEST_ERROR:
            raise ConfigError(
                f"D-PSGD sends the model itself: compression.kind = {type(self.compressor).__name__!r} would not "
                "converge. Use 'identity' or 'cast', or 'choco', 'adagossip' or 'deep_squeeze' for algorithm.kind (or "
                "algorithm.inner)."
            )

    @property
    def begins_before_gradient(self) -> bool:
        """Whether the models travel behind the gradient, to be combined first."""
        return self.order == "combine_then_adapt"

    @property
    def tolerates_loss(self) -> bool:
        """Yes: the models themselves are sent, and a rank's own takes the place of one that is lost."""
        return True

    def skip(self, state: DPSGDState) -> None:
        """Count the step."""
        state.step += 1

    def init(self, local: Local, exchange: Exchange) -> DPSGDState:
        """Start the compressor; the models themselves are all that is mixed."""
        return DPSGDState(self.compressor.init(local.spec, local.x.device, exchange.rank))

    def phases(self, local: Local, state: DPSGDState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring that `order` names."""
        if self.order == "adapt_then_combine":
            yield from super().phases(local, state, exchange)
        else:
            pending = self._start(local, state, exchange)
            yield pending.test
            self._combine_(local, state, exchange, pending)
            local.update()

    def mix(self, local: Local, state: DPSGDState, exchange: Exchange) -> None:
        """Exchange the models, and combine them."""
        self._combine_(local, state, exchange, self._start(local, state, exchange))

    def _start(self, local: Local, state: DPSGDState, exchange: Exchange) -> Pending:
        """Begin to exchange the models."""
        payload = self.compressor.compress(local.x, local.spec, state.compressor)
        return exchange.start(payload, self.compressor.layout(local.spec), exchange.schedule(state.step))

    def _combine_(self, local: Local, state: DPSGDState, exchange: Exchange, pending: Pending) -> None:
        """``x_i = x_i + gamma (sum_j W_ij x_j - x_i)`` in place, the own model first, then by ascending rank."""
        rank, topology = exchange.rank, exchange.schedule(state.step)
        arrived = pending.wait()
        lost = lost_weight(topology, rank, arrived)
        local.x.mul_(1 - self.gamma * (1 - topology.weight(rank, rank) - lost))
        for source, payload in arrived.items():
            self.compressor.accumulate(payload, local.spec, local.x, self.gamma * topology.weight(rank, source))
        state.step += 1

    def regroup_(self, local: Local, state: DPSGDState, exchange: Exchange) -> None:
        """Begin again with the schedule: the models are all that there is."""
        state.compressor, state.step = self.compressor.init(local.spec, local.x.device, exchange.rank), 0

    def check_local_steps(self) -> None:
        """Refuse the order whose exchange runs behind a gradient."""
        if self.begins_before_gradient:
            raise ConfigError(
                f"algorithm.order = {self.order!r}: D-PSGD would send behind one gradient, and local steps take "
                "several between two mixings. Use algorithm.order = 'adapt_then_combine'."
            )
