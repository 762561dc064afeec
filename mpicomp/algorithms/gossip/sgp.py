"""SGP: stochastic gradient push, gossip over directed graphs.

A rank gives shares of what it has to the ranks that it sends to, whoever sends to it. That preserves sums over the
ranks but not equal models, so every rank passes on a weight in the same shares: the quotient of both is an average,
and at consensus the mean.

    g_i = grad F_i(z_i)
    x_i = w_i z_i;  y_i = x_i - lr u_i
    send y_i and w_i to every target, receive y_j and w_j
    x_i = y_i + gamma (sum_j P_ij y_j - y_i)         (j = i included)
    w_i = w_i + gamma (sum_j P_ij w_j - w_i)
    z_i = x_i / w_i

z_i is the model (n,) of rank i and F_i the loss of its batch; x_i (n,) the numerator and w_i the weight, at first 1; lr
the learning rate; u_i the direction that the optimizer makes of g_i, with its momentum, and with the weight decay of
x_i; y_i the numerator after that local step; P_ij the share that rank j gives to rank i (`Topology.weight`); gamma the
consensus step, 1 in the published method.

With a compressor C that loses more than `Cast`, differences to public copies of the numerators travel, as in CHOCO-SGD,
and the weights as they are:

    q_i = C(y_i - xhat_i)                            send q_i and w_i to every target, receive q_j and w_j
    xhat_i = xhat_i + q_i;  d_i = d_i + sum_j P_ij (q_j - q_i)
    x_i = y_i + gamma (sum_j P_ij xhat_j - xhat_i) = y_i + gamma (d_i + (sum_j P_ij - 1) xhat_i)

xhat_i is the public copy, at first the model; d_i the sum of its differences to the copies of others, at first 0. gamma
must be as small as for CHOCO-SGD.

With ``overlap`` the message is sent before the gradient and taken in after it, so that it travels behind forward and
backward (overlap-SGP, with a delay of less than a step):

    x_i = w_i z_i;  send x_i, or C(x_i - xhat_i), and w_i;  g_i = grad F_i(z_i)
    x_i = x_i + gamma (sum_j P_ij x_j - x_i) - lr u_i, w_i and z_i as above

The sum of x over the ranks moves by the sum of the steps only, and the sum of w stays the number of ranks. An
evaluation has the plain mean of the z_i, as of every method; at consensus that is the sum of x over the sum of w. Where
P is doubly stochastic, w stays 1, and this is D-PSGD.

Wire: one dense vector or compressed message and 8 bytes, the same to every target. Memory: none; compressed ``xhat``,
``d`` and one scratch vector; with ``overlap`` one more scratch vector. Needs columns of P that sum to one, as
``topology.weights = "push"`` makes them on any directed graph, and a path from every rank to every other over the
steps. The graph may vary, but not with public copies. Assran et al. 2019, arXiv 1811.10792, Algorithms 1 and 2; Kempe,
Dobra and Gehrke 2003, doi 10.1109/SFCS.2003.1238221 (push-sum); Taheri et al. 2020, arXiv 2002.09964 (compressed).

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, SGP(overlap=True), topology=directed_ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, Phases, require_bounded_errors, require_positive
from mpicomp.algorithms.gossip.choco import compression_error
from mpicomp.algorithms.gossip.dpsgd import LARGEST_ERROR
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Field, Layout
from mpicomp.errors import TopologyError
from mpicomp.exchange.base import Exchange, Pending
from mpicomp.state import COUNTS, OWN, PUBLIC_COPY, SCRATCH, State
from mpicomp.topology.base import Schedule, Topology
from mpicomp.topology.spectral import require_connected

WEIGHT = "push_weight"
"""The field of a message with the weight of its sender."""


@dataclass
class Copies:
    """The public copies of numerators, seen from a rank.

    Attributes:
        x_hat: (n,) the own one.
        d: (n,) the sum of the differences of all others to it, weighted by the own row of P; 0 where all are equal.
        scratch: (n,) room for a difference.

    """

    x_hat: Tensor = field(metadata=PUBLIC_COPY)
    d: Tensor = field(metadata=OWN)
    scratch: Tensor = field(metadata=SCRATCH)


@dataclass
class SGPState:
    """What a rank keeps; its model is z, and the numerator w z.

    Attributes:
        w: (1,) float64, the weight; on new ranks 1.
        copies: of a compressor that loses something, else None.
        numerator: (n,) room for what is sent before the gradient; (0,) without `SGP.overlap`.
        compressor: state of the compressor.
        step: the number of steps done, which picks the graph of a varying schedule.

    """

    w: Tensor = field(metadata=COUNTS)
    copies: Copies | None
    numerator: Tensor = field(metadata=SCRATCH)
    compressor: State
    step: int = 0


@dataclass(frozen=True)
class SGP(Algorithm[SGPState]):
    """Stochastic gradient push with any optimizer as the local step.

    Attributes:
        gamma: consensus step, > 0; 1 without compression.
        compressor: any contractive compressor.
        overlap: whether the exchange runs behind the gradient.

    """

    gamma: float = 1.0
    compressor: Compressor = Identity()
    overlap: bool = False

    def __post_init__(self) -> None:
        require_positive(gamma=self.gamma)
        require_bounded_errors("SGP", self.compressor)

    @property
    def has_copies(self) -> bool:
        """Whether differences to public copies are sent, not the numerators themselves."""
        return self.compressor.relative_error > LARGEST_ERROR

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless the shares of each rank sum to one, and all ranks have paths to each other."""
        if not schedule(0).is_column_stochastic:
            raise TopologyError(
                f"topology.kind = {schedule.name!r}: the columns of its weights do not sum to one, so SGP would not "
                "preserve the sum over the ranks. Use topology.weights = 'push'."
            )
        if self.has_copies and not isinstance(schedule, Topology):
            raise TopologyError(
                f"topology.kind = {schedule.name!r} changes from step to step, but SGP with compression.kind = "
                f"{type(self.compressor).__name__!r} keeps public copies over a fixed neighborhood. Use a fixed graph, "
                "or compression.kind = 'identity' or 'cast'."
            )
        require_connected(schedule)

    def init(self, local: Local, exchange: Exchange) -> SGPState:
        """Return a weight of 1: the numerator, and its public copy, are the model at first."""
        x = local.x
        return SGPState(
            torch.ones(1, dtype=torch.float64, device=x.device),
            Copies(x.clone(), torch.zeros_like(x), torch.empty_like(x)) if self.has_copies else None,
            torch.empty_like(x) if self.overlap else x.new_empty(0),
            self.compressor.init(local.spec, x.device, exchange.rank),
        )

    def phases(self, local: Local, state: SGPState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        x, w = local.x, state.w[0]
        if self.overlap:
            pending = self._start(torch.mul(x, w, out=state.numerator), local, state, exchange)
            yield pending.test
            x.mul_(w)
            self._combine_(local, state, exchange, pending)
            local.update()
        else:
            yield None
            x.mul_(w)
            local.update()
            self._combine_(local, state, exchange, self._start(x, local, state, exchange))
        x.div_(w)
        state.step += 1

    def _start(self, numerator: Tensor, local: Local, state: SGPState, exchange: Exchange) -> Pending:
        """Begin to exchange numerators, or their differences to public copies, and weights."""
        compressor, spec, copies = self.compressor, local.spec, state.copies
        if copies is None:
            own = compressor.compress(numerator, spec, state.compressor)
        else:
            own = compressor.compress_difference_(numerator, copies.x_hat, spec, state.compressor, copies.scratch)
        layout = Layout((Field(WEIGHT, state.w.dtype, 1), *compressor.layout(spec).fields))
        topology = exchange.schedule(state.step)
        pending = exchange.start({WEIGHT: state.w, **own}, layout, topology)
        if copies is not None:
            compressor.accumulate(own, spec, copies.d, -_taken(topology, exchange.rank))
        return pending

    def _combine_(self, local: Local, state: SGPState, exchange: Exchange, pending: Pending) -> None:
        """Mix numerator and weight in place with those of the sources, the own ones first, then by ascending rank."""
        x, w, copies, gamma = local.x, state.w, state.copies, self.gamma
        rank, topology = exchange.rank, exchange.schedule(state.step)
        kept = topology.weight(rank, rank)
        arrived = pending.wait()
        # In this order 1 with gamma = 1 leaves the share as it is, to the last bit.
        w.mul_(1 - gamma + gamma * kept)
        if copies is None:
            x.mul_(1 - gamma + gamma * kept)
        for source, message in arrived.items():
            share = topology.weight(rank, source)
            payload = {name: tensor for name, tensor in message.items() if name != WEIGHT}
            if copies is None:
                self.compressor.accumulate(payload, local.spec, x, gamma * share)
            else:
                self.compressor.accumulate(payload, local.spec, copies.d, share)
            w.add_(message[WEIGHT], alpha=gamma * share)
        if copies is not None:
            x.add_(copies.d, alpha=gamma)
            x.add_(copies.x_hat, alpha=gamma * (kept + _taken(topology, rank) - 1))

    def diagnostics(self, local: Local, state: SGPState) -> dict[str, float]:
        """Return ``compression_error``, |x - xhat| / |x| of the numerator, if there is a public copy."""
        if state.copies is None:
            return {}
        numerator = local.x * state.w[0]
        return {"compression_error": compression_error(numerator, state.copies.x_hat, state.copies.scratch)}


def _taken(topology: Topology, rank: int) -> float:
    """Return the sum of the shares that `rank` gets of others."""
    return sum(topology.weight(rank, source) for source in topology.sources(rank))
