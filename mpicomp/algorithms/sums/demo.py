"""DeMo, decoupled momentum: ranks send the largest cosine coefficients of their momentum, and all step by a sign.

    G_k = DCT(lr grad F_k(x))                              of each chunk
    M_k = mu M_k + G_k                                     momentum, kept as its coefficients
    q_k = the k largest of each chunk of M_k
    M_k = M_k - q_k
    Q = sum_k q_k / how many ranks sent it                 of each coefficient; 0 where none did
    x = (1 - lr lambda) x - lr sign(DCT'(Q))               by the optimizer, on all ranks alike

x is the model (n,), the same on all ranks; F_k the loss of the batch of rank k; M_k (n,) its momentum, less what it has
sent, and mu the parameter ``momentum``; q_k its message; Q (n,) the mean over the ranks that sent a coefficient, not
over all; lr the learning rate and lambda the weight decay, both of the optimizer, which must have no momentum: so use
`torch.optim.SGD`. DCT is the orthonormal cosine transform of type II, ``C X C'`` of a chunk X, with

    C[i, j] = c_i cos(pi (2 j + 1) i / (2 s)),  i, j = 0 ... s - 1,  c_0 = sqrt(1 / s),  else c_i = sqrt(2 / s)

for a side of s, and DCT' its inverse, ``C' X C``. The paper keeps the momentum itself, ``m = mu m + lr grad``, and
takes ``DCT'(q)`` from it. The transform is linear, so this is the same with one transform less.

Chunks are cut as by the reference code: a side of a chunk is the largest divisor, up to ``chunk``, of that of the
matrix. So all chunks of a tensor are equal, and none has a rest. But a dimension that is a prime above ``chunk`` has
sides of 1, and its tensor is sent nearly whole: choose dimensions with divisors. ``k`` is the same for all chunks; a
shorter one is sent whole, and a bias has chunks of up to ``chunk`` entries, of which 32 is much. The reference code
takes one or two dimensions; here a tensor of more is a matrix with its first one for rows.

Steps have the length of ``lr`` in every entry, as in Adam's start: choose lr as for Adam, and let it fall. An entry
that never has a gradient moves, too, if others of its chunk do. With all coefficients kept this is sign descent on the
mean gradient. Every rank transforms the same Q and must get the same bits of it, so use ranks of the same kind.

Wire: star: a worker the ``k`` coefficients of each chunk, of 4 bytes and 12 bits for the place, the hub the mean
without its zeros to each worker; ring: ``size - 1`` messages a rank. Memory: ``M_k``, and on servers one vector while
they add up. Peng et al. 2024, arXiv 2411.19870: chunks of 64 x 64, k = 32, mu = 0.999.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=4e-4, weight_decay=0.1)
    gossip = mpicomp.distribute(model, optimizer, DeMo(k=32), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mpicomp.algorithms.base import Local, Phases, require_fraction
from mpicomp.algorithms.sums.base import SummingAlgorithm, require_no_momentum, require_sgd
from mpicomp.compression.base import Wrapper
from mpicomp.compression.block_topk import Blocks, LargestOfBlocks
from mpicomp.compression.message import Payload, Spec
from mpicomp.compression.wrap.feedback import ErrorFeedback, FeedbackState
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.kernels.reference import LARGEST_BLOCK
from mpicomp.state import ERROR_OF_GRADIENTS
from mpicomp.timing import timed

_LONGEST_SIDE = math.isqrt(LARGEST_BLOCK)


@dataclass
class DeMoState:
    """What a rank keeps.

    Attributes:
        momentum: (n,) the coefficients M of the momentum that have not been sent.

    """

    momentum: Tensor = field(metadata=ERROR_OF_GRADIENTS)


@dataclass(frozen=True)
class DeMo(SummingAlgorithm[DeMoState]):
    """Sign descent on the largest cosine coefficients of the momenta of all ranks.

    Attributes:
        chunk: the longest side of a chunk, 1 to 64.
        k: how many coefficients of a chunk are sent, at least 1.
        momentum: mu in [0, 1).

    """

    ranks_stay_equal: ClassVar[bool] = True

    chunk: int = _LONGEST_SIDE
    k: int = 32
    momentum: float = 0.999

    def __post_init__(self) -> None:
        if not 1 <= self.chunk <= _LONGEST_SIDE:
            raise ConfigError(f"algorithm.chunk = {self.chunk} must be in 1...{_LONGEST_SIDE}: the side of a chunk")
        if self.k < 1:
            raise ConfigError(f"algorithm.k = {self.k} must be at least 1: coefficients of a chunk that are sent")
        require_fraction(momentum=self.momentum)

    def init(self, local: Local, exchange: Exchange) -> DeMoState:
        """Return a momentum of zero, once the optimizer is found to be SGD, and to have none."""
        require_sgd("DeMo", local)
        require_no_momentum("DeMo", local)
        return DeMoState(torch.zeros_like(local.x))

    def phases(self, local: Local, state: DeMoState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        require_no_momentum("DeMo", local)
        yield None
        g, spec, largest = local.g, local.spec, _Largest(self.chunk, self.k)
        for part, group in local.groups:
            g[part].mul_(group["lr"])
        transform_(g, spec, self.chunk)
        state.momentum.mul_(self.momentum).add_(g)
        q = ErrorFeedback(largest).compress_sum(spec, FeedbackState(state.momentum, None))
        _mean_of_senders_(q, largest, spec, g, exchange)
        transform_(g, spec, self.chunk, inverse=True)
        g.sign_()
        local.update()

    def diagnostics(self, local: Local, state: DeMoState) -> dict[str, float]:
        """Return ``error_norm``, |M|, that of the momentum which has not been sent."""
        return {"error_norm": float(state.momentum.norm())}


@timed("compress")
def transform_(x: Tensor, spec: Spec, chunk: int, inverse: bool = False) -> None:
    """Replace each chunk of the flat `x` (n,) by its cosine coefficients, or with `inverse` these by the chunk."""
    for part, entries in zip(spec.parts, spec.split(x), strict=True):
        if not part.numel:
            continue
        rows, columns = _matrix(part.shapes[0])
        height, width = _side(rows, chunk), _side(columns, chunk)
        across, down = (_cosines(side, x.dtype, x.device) for side in (width, height))
        found = entries.view(-1, width) @ (across if inverse else across.T)
        if height > 1:
            found = (down.T if inverse else down) @ found.view(-1, height, columns)
        entries.copy_(found.view(-1))


@functools.lru_cache(maxsize=256)
def _cosines(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return C (side, side), the orthonormal transform of type II as a matrix."""
    i = torch.arange(side)
    turns = i[:, None] * (2 * i + 1)
    matrix = torch.cos(math.pi / (2 * side) * turns.double()) * math.sqrt(2 / side)
    matrix[0] = math.sqrt(1 / side)
    matrix[turns % (2 * side) == side] = 0.0  # cos(pi / 2), whose rounding would get a sign
    return matrix.to(dtype).to(device)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return rows and columns of a tensor as a matrix; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


def _side(length: int, chunk: int) -> int:
    """Return the largest divisor of `length` up to `chunk`."""
    return next(side for side in range(min(length, chunk), 0, -1) if length % side == 0)


@dataclass(frozen=True)
class _Largest(LargestOfBlocks):
    """Keep the largest coefficients of each chunk.

    Attributes:
        chunk: its longest side.
        k: how many are kept.

    """

    chunk: int
    k: int

    def blocks_of(self, shape: tuple[int, ...]) -> Blocks:
        """Return the chunks of a matrix; a vector is one row."""
        if not math.prod(shape):
            return np.empty((0, 5), np.int64)
        rows, columns = _matrix(shape)
        height, width = _side(rows, self.chunk), _side(columns, self.chunk)
        top, left = (axis.ravel() for axis in np.mgrid[0:rows:height, 0:columns:width])
        alike = (width, columns, height * width, min(self.k, height * width))
        return np.column_stack([top * columns + left, *(np.full_like(top, number) for number in alike)])

    @property
    def _longest(self) -> int:
        return self.chunk**2


@dataclass(frozen=True)
class _Counted(Wrapper):
    """A compressor that counts the messages in which an entry is.

    Attributes:
        senders: (n,) the counts, which reading a message adds to.

    """

    senders: Tensor

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add the message to `out`, and its entries to the counts."""
        self.inner.accumulate(payload, spec, out, weight)
        self.inner.accumulate({**payload, "values": torch.ones_like(payload["values"])}, spec, self.senders)


def _mean_of_senders_(q: Payload, largest: _Largest, spec: Spec, out: Tensor, exchange: Exchange) -> None:
    """Overwrite `out` (n,) with the mean of each coefficient over the ranks that sent it, on every rank."""
    aggregator, senders = Aggregator(exchange), torch.zeros_like(out)
    sum_ = aggregator.start(q, _Counted(largest, senders), spec, [1.0] * exchange.size)
    sum_.wait_on_servers(out)
    if aggregator.is_server:
        out.div_(senders.clamp_min_(1.0))
    aggregator.share_(out, spec)
