"""PowerSGD: gradients as products of two narrow matrices, by one power iteration a step from where the last one ended.

    G_k = grad F_k(x)
    M_k = G_k + E_k                                        each tensor as a matrix: shape[0] x the rest
    P = orthogonal basis of sum_k w M_k Q                  first sum, of the P of all matrices together
    Q = sum_k w M_k' P                                     second sum, and with it the tensors of one dimension, whole
    g = P Q';  E_k = M_k - g                               Q is kept: the next step starts from it
    x = x - lr u(g)                                        on all ranks alike

x is the model, the same on all ranks; F_k the loss of the batch of rank k, and G_k (m, n) its gradient for one tensor;
E_k (m, n) its error memory, what the projection has left out so far; P (m, r) and Q (n, r) the narrow matrices and r
the parameter ``rank``; M' the transpose of M; w = 1 / size; g the mean gradient as far as P spans it; lr the learning
rate; u(g) the direction that the optimizer makes of g.

The projection is linear, so ``P Q'`` is that of the mean gradient, and with full rank the mean gradient itself. The
basis is that of a QR decomposition (`torch.linalg.qr`; the authors' library has Gram-Schmidt), which is complete even
where ``M Q`` is not: a matrix whose gradients were zero does not stay lost. Every rank decomposes the same P and must
get the same bits of it, so use ranks of the same kind.

The paper's momentum is ``m = mu m + g;  x = x - lr (g + m)``, where mu is the parameter ``momentum``: constant
gradients make steps of ``1 + 1 / (1 - mu)`` times their length. No optimizer of torch does that: its heavy ball is
``x - lr m``, its Nesterov ``x - lr (g + mu m)``. Leave ``momentum`` at 0 to use theirs on g. Weight decay is the
optimizer's, so it is not compressed. The authors' library does half an iteration at a time, and sends gradients whole
in its first 100 steps; this follows the paper.

Wire: two dense sums (see `mpicomp.exchange.sums.aggregate`), of ``sum r m`` and ``sum r n`` entries for matrices of
m x n; what is sent whole is part of the second. Memory: ``E_k``, ``Q``, and one vector with ``momentum``. Vogels et al.
2019, arXiv 1905.13727, Algorithms 1 and 2.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gossip = mpicomp.distribute(model, optimizer, PowerSGD(rank=2), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction
from mpicomp.algorithms.low_rank import LowRank, orthogonal
from mpicomp.algorithms.sums.base import SummingAlgorithm, require_no_momentum
from mpicomp.compression.message import Spec
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.state import ERROR_OF_GRADIENTS, MOMENT


@dataclass
class PowerSGDState:
    """What a rank keeps.

    Attributes:
        error: (n,) what the projection has left out; zero for tensors that are sent whole.
        right: the Q of all matrices, one behind the other, the same on all ranks; then room for what is sent whole.
        velocity: (n,) the paper's momentum, or None without.

    """

    error: Tensor = field(metadata=ERROR_OF_GRADIENTS)
    right: Tensor
    velocity: Tensor | None = field(metadata=MOMENT)


@dataclass(frozen=True)
class PowerSGD(SummingAlgorithm[PowerSGDState]):
    """SGD on a low-rank approximation of the mean gradient.

    Attributes:
        rank: r, at least 1; less for a matrix that has fewer rows or columns.
        momentum: mu in [0, 1) of the paper's momentum; above 0 the optimizer must have none.
        min_compression_rate: a matrix is sent whole unless its P and Q have at most one in so many of its entries.
        seed: of the first Q.

    """

    ranks_stay_equal: ClassVar[bool] = True
    updates_with_sum: ClassVar[bool] = True

    rank: int = 2
    momentum: float = 0.0
    min_compression_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"algorithm.rank = {self.rank} must be at least 1")
        if not self.min_compression_rate >= 0:
            raise ConfigError(f"algorithm.min_compression_rate = {self.min_compression_rate} must be at least 0")
        require_fraction(momentum=self.momentum)

    def init(self, local: Local, exchange: Exchange) -> PowerSGDState:
        """Return an error of zero, and random Q, the same on all ranks."""
        if self.momentum:
            require_no_momentum("PowerSGD", local)
        generator = torch.Generator().manual_seed(self.seed)
        low_rank = self._low_rank(local.spec)
        numel = low_rank.right_numel + low_rank.whole_numel
        right = torch.randn(numel, generator=generator, dtype=torch.float64)
        velocity = torch.zeros_like(local.x) if self.momentum else None
        return PowerSGDState(torch.zeros_like(local.x), right.to(local.x), velocity)

    def phases(self, local: Local, state: PowerSGDState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        if self.momentum:
            require_no_momentum("PowerSGD", local)
        yield None
        g, right, aggregator, low_rank = local.g, state.right, Aggregator(exchange), self._low_rank(local.spec)
        left = g.new_empty(low_rank.left_numel)
        error = state.error.add_(g)  # M_k = G_k + E_k
        factors, sent = torch.split(right, [low_rank.right_numel, low_rank.whole_numel])
        matrices = list(
            zip(
                low_rank.matrices(error),
                low_rank.matrices(g),
                low_rank.lefts(left),
                low_rank.rights(factors),
                strict=True,
            )
        )
        whole = list(zip(low_rank.whole(error), low_rank.whole(g), low_rank.sent_whole(sent), strict=True))
        for m, _, p, q in matrices:
            torch.mm(m, q, out=p)  # M_k Q
        aggregator.mean_(left)
        for m, _, p, q in matrices:
            p.copy_(orthogonal(p))
            torch.mm(m.T, p, out=q)  # M_k' P
        for m, _, part in whole:
            part.copy_(m)
        aggregator.mean_(right)
        for m, mean, p, q in matrices:
            torch.mm(p, q.T, out=mean)  # g = P Q'
            m.sub_(mean)  # E_k
        for m, mean, part in whole:
            mean.copy_(part)
            m.zero_()
        if state.velocity is not None:
            g.add_(state.velocity.mul_(self.momentum).add_(g))
        local.update()

    def _low_rank(self, spec: Spec) -> LowRank:
        return LowRank(spec, self.rank, self.min_compression_rate)

    def diagnostics(self, local: Local, state: PowerSGDState) -> dict[str, float]:
        """Return ``error_norm``, |E|."""
        return {"error_norm": float(state.error.norm())}
