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
``mpicomp.topology.spectral.best_step``). Any graph whose weights are doubly stochastic, also directed or varying.

Wire: one dense vector to each neighbor and step; `Cast` halves it. Lian et al. 2017, arXiv 1705.09056, Algorithm 1.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, DPSGD(order="combine_then_adapt"), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mpicomp.algorithms.base import Algorithm, Local, Phases, require_positive
from mpicomp.compression.base import Compressor
from mpicomp.compression.cast import Cast
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.topology.base import Topology


@dataclass
class DPSGDState:
    """The number of steps done, which picks the graph of a varying schedule."""

    step: int = 0


@dataclass(frozen=True)
class DPSGD(Algorithm[DPSGDState]):
    """Decentralized parallel SGD.

    Attributes:
        order: whether the local step comes before the averaging, or overlaps it.
        gamma: diffusion rate, > 0; 1 replaces the model by the weighted average.
        compressor: `Identity` or `Cast`: a lossy message of the model itself, without error memory, does not converge.

    """

    order: Literal["adapt_then_combine", "combine_then_adapt"] = "adapt_then_combine"
    gamma: float = 1.0
    compressor: Compressor = Identity()

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        if not isinstance(self.compressor, Identity | Cast):
            raise ConfigError(
                f"algorithm.kind = 'dpsgd' sends the model itself: compression.kind = "
                f"{type(self.compressor).__name__!r} would not converge. Use 'identity' or 'cast', or "
                "algorithm.kind = 'choco', 'adagossip' or 'deep_squeeze'."
            )

    @property
    def begins_before_gradient(self) -> bool:
        """Whether the models travel behind the gradient, to be combined first."""
        return self.order == "combine_then_adapt"

    def init(self, local: Local, exchange: Exchange) -> DPSGDState:
        """Return a count of no steps: the models themselves are all that is mixed."""
        return DPSGDState()

    def phases(self, local: Local, state: DPSGDState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring that `order` names."""
        topology = exchange.schedule(state.step)
        if self.order == "adapt_then_combine":
            yield None
            local.update()
            combine_(local, start(local, exchange, topology, self.compressor), exchange, topology, self)
        else:
            pending = start(local, exchange, topology, self.compressor)
            yield pending.test
            combine_(local, pending, exchange, topology, self)
            local.update()
        state.step += 1


def start(local: Local, exchange: Exchange, topology: Topology, compressor: Compressor) -> Pending:
    """Begin to exchange the models."""
    payload = compressor.compress(local.x, local.spec, None)
    return exchange.start(payload, compressor.layout(local.spec), topology)


def combine_(local: Local, pending: Pending, exchange: Exchange, topology: Topology, method: DPSGD) -> None:
    """``x_i = x_i + gamma (sum_j W_ij x_j - x_i)`` in place, the own model first, then by ascending rank."""
    rank, gamma = exchange.rank, method.gamma
    arrived = pending.wait()
    local.x.mul_(1 - gamma * (1 - topology.weight(rank, rank)))
    for source, payload in arrived.items():
        method.compressor.accumulate(payload, local.spec, local.x, gamma * topology.weight(rank, source))
