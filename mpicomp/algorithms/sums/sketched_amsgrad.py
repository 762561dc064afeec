"""SketchedAMSGrad: AMSGrad whose ranks add up count sketches of their gradients, and step where it matters most.

    G = sum_k S(grad F_k(x)) / N                         the only message: a table, summed over all N ranks
    h = U(G);  v = beta2 v + (1 - beta2) h h             an estimate of the mean gradient, and its second moment
    v' = max(v', v)
    M = beta1 M + (1 - beta1) G                          the sketch of the first moment
    P = E + alpha_t M                                    with what was left out before
    p = U(P);  D = p / (sqrt(v') + epsilon)
    I = the places of the k largest entries of |D|
    E = P - S(p on I)                                    what is left out now
    x = (1 - lr weight_decay) x - D on I                 on all ranks alike

x is the model (n,), the same on all ranks, and F_k the loss of the batch of rank k; S(x) (rows, columns) the count
sketch of a vector and U(S) (n,) what is read from it (`mpicomp.algorithms.sums.count_sketch`); v and v' (n,) the second
moment and its maximum so far; M and E (rows, columns) the sketches of the mean first moment and of the error memory,
in the unit of a parameter; lr the learning rate and alpha_t the same. With ``bias_correction``, alpha_t is
``lr / (1 - beta1^t)`` and v' is divided by ``1 - beta2^t`` under the root, in step t from 1 on, as
`torch.optim.Adam` does with ``amsgrad=True``. Products, roots and quotients are elementwise.

In the paper, rank k keeps its first moment m_k and error memory e_k as vectors, and sends
``S(m_k + alpha_{t-1} / alpha_t e_k)``. As S is linear, and only the mean of that enters the step, all ranks can keep
the sketches of the mean of both instead: with E = alpha_t S(mean of e_k), the steps are the same (tested). It takes
less memory, errors of single ranks cannot grow where their data differ, and the mean gradient can be read from the same
message.

From the paper: momentum on the ranks, the sketch of it and the error memory, AMSGrad's maximum on the server, the
top-k of what is read over its root. Its text could not be read beyond the abstract and a summary. So these are this
package's reading: h is the mean gradient, so that without loss this is AMSGrad; the error memory loses p, what was
applied before the division by the root, not D: all p that were applied, and E, are then all that came in (tested, of
sketches); epsilon is added to the root, where the paper starts v and v' with it; bias correction and weight decay.

An estimate has an error of about ``|grad| / sqrt(columns)`` in every entry, and v is not smaller than its square. So
with an ``epsilon`` far below that, D is as large where there is only error as elsewhere, steps go there, and training
may diverge: on digits it did with 1e-8. With 0.1, near the usual size of the estimates, the largest p are found first.
And k must be far below ``columns``, a twentieth there: what is read of more entries is mostly their errors.

A sketch cannot be divided by parameters: those that are frozen still have a part in M, E and I, and what is applied to
them is lost.

Where the groups of the optimizer have different learning rates, lr is the largest of them, and a part of x moves by its
own over that. Every rank reads the same tables and must get the same bits of them, so use ranks of the same kind.

Wire: a dense sum (see `mpicomp.exchange.sums.aggregate`) of ``rows x columns`` numbers. Memory: v and v', ``rows``
vectors of places, and three tables. Xian, Huang, Huang 2022, arXiv 2210.07454.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gossip = mpicomp.distribute(model, optimizer, SketchedAMSGrad(columns=20, k=10), topology=ring)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import Local, Phases
from mpicomp.algorithms.sums.adam import OwnAdam
from mpicomp.algorithms.sums.base import SummingAlgorithm
from mpicomp.algorithms.sums.count_sketch import CountSketch
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.kernels.reference import sqrt
from mpicomp.state import SCRATCH


@dataclass
class SketchedAMSGradState:
    """What a rank keeps, the same on all ranks.

    Attributes:
        v: (n,) second moment of the mean gradient as it is read.
        largest: (n,) the largest v so far.
        momentum: (rows, columns) the sketch M of the first moment.
        error: (rows, columns) the sketch E of what was left out, in the unit of a parameter.
        sketch: of gradients; made again from the seed.
        steps: steps done.

    """

    v: Tensor
    largest: Tensor
    momentum: Tensor
    error: Tensor
    sketch: CountSketch = field(metadata=SCRATCH)
    steps: int = 0


@dataclass(frozen=True)
class SketchedAMSGrad(OwnAdam[SketchedAMSGradState], SummingAlgorithm[SketchedAMSGradState]):
    """AMSGrad on count sketches of the gradients of all ranks.

    Attributes:
        columns: of a sketch; more than the model has entries are not used.
        k: how many entries of the model move in a step, 1 to `columns`.
        rows: of a sketch, an odd number.
        seed: of the sketch.

    """

    ranks_stay_equal: ClassVar[bool] = True

    columns: int
    k: int
    rows: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.columns:
            raise ConfigError(
                f"algorithm.k = {self.k} must be at least 1 and at most algorithm.columns = {self.columns}: a sketch "
                "does not tell more entries apart"
            )
        if self.rows < 1 or self.rows % 2 == 0:
            raise ConfigError(f"algorithm.rows = {self.rows} must be an odd number: the median is one of its rows")

    def init(self, local: Local, exchange: Exchange) -> SketchedAMSGradState:
        """Return moments and errors of zero, once the optimizer is found to fit."""
        self.require_plain_optimizer(local)
        sketch = CountSketch(local.x, self.rows, self.columns, self.seed)
        v, largest = torch.zeros_like(local.x), torch.zeros_like(local.x)
        momentum, error = v.new_zeros(sketch.shape), v.new_zeros(sketch.shape)
        return SketchedAMSGradState(v, largest, momentum, error, sketch)

    def phases(self, local: Local, state: SketchedAMSGradState, exchange: Exchange) -> Phases:
        """Do one step in the order of the module's docstring."""
        t = state.steps + 1
        yield None
        g, sketch = local.g, state.sketch
        table = sketch.of(g)
        Aggregator(exchange).mean_(table.view(-1))
        sketch.read(table, g)  # h
        state.v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        torch.maximum(state.largest, state.v, out=state.largest)
        state.momentum.mul_(self.beta1).add_(table, alpha=1 - self.beta1)
        lr = max((group["lr"] for _, group in local.groups), default=0.0)
        first, root = self.corrections(t, t)
        state.error.add_(state.momentum, alpha=lr / first)  # P
        p = sketch.read(state.error, g)
        step = p / sqrt(state.largest).div_(root).add_(self.epsilon)  # D
        values, places = kernels.top_k(step, min(self.k, len(step)))
        at = places.long()
        applied = torch.zeros_like(p).index_copy_(0, at, p[at])
        state.error.sub_(sketch.of(applied))
        self.decay_(local)
        step.zero_().index_copy_(0, at, values)
        for part, group in local.groups:
            if group["lr"] != lr:
                step[part].mul_(group["lr"] / lr)
        local.x.sub_(step)
        self.tell_optimizer(local)
        state.steps = t

    def diagnostics(self, local: Local, state: SketchedAMSGradState) -> dict[str, float]:
        """Return ``error_norm``, an estimate of the norm of the error memory: that of a row of its sketch."""
        return {"error_norm": float(state.error.norm()) / self.rows**0.5}
