"""PowerGossip: differences of neighbors' models as products of two narrow matrices, by power iterations on each edge.

    g_i = grad F_i(x_i)
    x_i = x_i - lr u_i
    ``iterations`` times, on every edge e = (i, j), i < j, at once, with each tensor as a matrix X: shape[0] x the rest
        odd:   Q_e = orthogonal basis of Q_e;  P_e = X_j Q_e - X_i Q_e      i sends X_i Q_e to j, and j sends X_j Q_e
        even:  P_e = orthogonal basis of P_e;  Q_e = X_j' P_e - X_i' P_e    i sends X_i' P_e, and j sends X_j' P_e
        X_i = X_i + W_ij P_e Q_e';  X_j = X_j - W_ij P_e Q_e'
        if the new P_e, or Q_e, is 0, take the one before

x_i is the model (n,) of rank i and F_i the loss of its batch; lr the learning rate; u_i the direction that the
optimizer makes of g_i, with its momentum and weight decay; X_i (m, n) one tensor of x_i after that local step; P_e
(m, r) and Q_e (n, r) the narrow matrices of edge e and r the parameter ``rank``; X' the transpose of X; W_ij the weight
of rank j in the average of rank i. Odd and even alternate from iteration to iteration, also from step to step.

An iteration projects the difference ``X_j - X_i`` on the columns of P_e or Q_e, and two of them in turn are a power
iteration, so the columns turn towards its largest singular vectors. The projection is linear: neither end needs to know
the other's model, there is no error memory, and no consensus step to tune. Both ends move by the same amount, so the
mean over ranks is preserved. Tensors of one dimension, and matrices of which P and Q would not be shorter, are sent
whole in the first iteration of a step: of them this is D-PSGD. Both ends find the same bases from the same numbers, so
use ranks of the same kind.

On a fixed graph each edge keeps its P_e and Q_e for the next step (a warm start); at first they are random, the same on
both ends, drawn by (seed, i, j). On a graph that varies, such as random pairs, an edge seldom comes back, and keeping
the matrices of all pairs would take the memory of as many edges as there are ranks; there they are drawn anew by (seed,
i, j, step). With ``iterations = 1`` such a step is a random projection, so take 2.

Models that do not differ, as before the first step with a learning rate above 0, make a factor of zeros. No basis comes
of it that could find a later difference, so both ends keep the one that they had.

The authors' code multiplies the move by a diffusion rate and skips the first iteration, where models are equal; here
the rate is 1, and the models differ by a local step. The gradient comes before the mixing.

Wire: to each neighbor a message of its own, in iterations in turn of ``sum r m`` and ``sum r n`` entries for matrices
of m x n; what is sent whole is part of the first in a step. Memory: P_e and Q_e of each edge of this rank. Needs
symmetric doubly stochastic weights; the graph may vary. Vogels, Karimireddy, Jaggi 2020, arXiv 2008.01425, Algorithm 2.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, PowerGossip(rank=1, iterations=2), topology=RandomMatching)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, require_symmetric
from mpicomp.algorithms.gossip.base import Gossip
from mpicomp.algorithms.low_rank import LowRank, orthogonal
from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.state import OWN
from mpicomp.topology.base import Schedule, Topology


@dataclass
class PowerGossipState:
    """What a rank keeps.

    Attributes:
        left: (degree, sum r m) the P of all matrices, one behind the other; a row for each neighbor, ascending. No rows
            on a graph that varies.
        right: (degree, sum r n) the Q, likewise.
        step: the number of steps done, which picks the graph of a varying schedule, and the factor that is sent.

    """

    left: Tensor = field(metadata=OWN)  # on new ranks they begin anew, as both ends of an edge must
    right: Tensor = field(metadata=OWN)
    step: int = 0


class Edge(NamedTuple):
    """The P and the Q of the edge to a neighbor, in flat vectors."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class PowerGossip(Gossip[PowerGossipState]):
    """PowerGossip with any optimizer as the local step.

    Attributes:
        rank: r, at least 1; less for a matrix that has fewer rows or columns.
        iterations: exchanges of a step, at least 1; two are a whole power iteration.
        seed: of the first P and Q of each edge.

    """

    rank: int = 1
    iterations: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value in (("rank", self.rank), ("iterations", self.iterations)):
            if value < 1:
                raise ConfigError(f"algorithm.{key} = {value} must be at least 1")

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` has undirected graphs with symmetric weights."""
        require_symmetric("PowerGossip", schedule)

    def init(self, local: Local, exchange: Exchange) -> PowerGossipState:
        """Return random P and Q for each edge of a fixed graph, the same on both ends."""
        low_rank, schedule = LowRank(local.spec, self.rank), exchange.schedule
        neighbors = schedule.sources(exchange.rank) if isinstance(schedule, Topology) else []
        left = local.x.new_empty(len(neighbors), low_rank.left_numel)
        right = local.x.new_empty(len(neighbors), low_rank.right_numel)
        for neighbor, *rows in zip(neighbors, left, right, strict=True):
            for row, drawn in zip(rows, self._draw(low_rank, local.x, exchange.rank, neighbor, 0), strict=True):
                row.copy_(drawn)
        return PowerGossipState(left, right)

    def mix(self, local: Local, state: PowerGossipState, exchange: Exchange) -> None:
        """Move towards the neighbors, as far as the narrow matrices span the differences."""
        low_rank, topology = LowRank(local.spec, self.rank), exchange.schedule(state.step)
        neighbors = topology.sources(exchange.rank)
        if isinstance(exchange.schedule, Topology):
            edges = {j: Edge(*rows) for j, *rows in zip(neighbors, state.left, state.right, strict=True)}
        else:
            edges = {j: self._draw(low_rank, local.x, exchange.rank, j, state.step) for j in neighbors}
        for iteration in range(self.iterations):
            is_odd = (state.step * self.iterations + iteration) % 2 == 0
            _iterate_(local.x, low_rank, edges, exchange, topology, is_odd, sends_whole=iteration == 0)
        state.step += 1

    def _draw(self, low_rank: LowRank, x: Tensor, rank: int, neighbor: int, step: int) -> Edge:
        """Return random P and Q, which depend on the seed, the pair and the step; the same on both ends."""
        pair = f"{self.seed} {min(rank, neighbor)} {max(rank, neighbor)} {step}"
        digest = hashlib.sha256(pair.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        numels = [low_rank.left_numel, low_rank.right_numel]
        drawn = torch.randn(sum(numels), generator=generator, dtype=torch.float64)
        return Edge(*torch.split(drawn.to(x), numels))


def _iterate_(
    x: Tensor,
    low_rank: LowRank,
    edges: Mapping[int, Edge],
    exchange: Exchange,
    topology: Topology,
    is_odd: bool,
    sends_whole: bool,
) -> None:
    """Do one iteration on all edges of this rank: x (n,) and the matrices of the edges change in place."""
    matrices = low_rank.matrices(x) if is_odd else [matrix.T for matrix in low_rank.matrices(x)]
    found = {j: edge.left if is_odd else edge.right for j, edge in edges.items()}  # flat, of the factor that is sent
    factors, before = {}, {}
    for j, edge in edges.items():
        bases, products = low_rank.rights(edge.right), low_rank.lefts(edge.left)
        if not is_odd:
            bases, products = products, bases
        before[j] = found[j].clone()
        for matrix, basis, product in zip(matrices, bases, products, strict=True):
            basis.copy_(orthogonal(basis))
            torch.mm(matrix, basis, out=product)  # X_i Q_e, or X_i' P_e
        factors[j] = list(zip(matrices, bases, products, strict=True))
    numel = low_rank.left_numel if is_odd else low_rank.right_numel
    layout = Layout((Field("factor", x.dtype, numel), Field("whole", x.dtype, low_rank.whole_numel * sends_whole)))
    parts = low_rank.whole(x) if sends_whole else []
    own = torch.cat(parts) if parts else x.new_empty(0)
    pending = exchange.start_each({j: {"factor": found[j], "whole": own} for j in edges}, layout, topology)
    move = torch.zeros_like(own)
    for j, message in pending.wait().items():
        weight, sign = topology.weight(exchange.rank, j), 1 if exchange.rank < j else -1
        # The same bits on both ends: a difference changes its sign only.
        torch.sub(message["factor"], found[j], out=found[j]).mul_(sign)
        for matrix, basis, difference in factors[j]:
            matrix.addmm_(difference, basis.T, alpha=sign * weight)
        last = low_rank.lefts(before[j]) if is_odd else low_rank.rights(before[j])
        for (_, _, difference), kept in zip(factors[j], last, strict=True):
            torch.where(difference.any(), difference, kept, out=difference)
        move.add_(message["whole"] - own, alpha=weight)
    for part, moved in zip(parts, low_rank.sent_whole(move) if sends_whole else [], strict=True):
        part.add_(moved)
