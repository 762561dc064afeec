"""FedAdam-SSM: local steps of Adam, whose model and moments are averaged where one shared mask lets them through.

    every step:      g_k = grad F_k(w_k)
                     m_k = beta1 m_k + (1 - beta1) g_k;  v_k = beta2 v_k + (1 - beta2) g_k g_k
                     w_k = (1 - lr weight_decay) w_k - alpha_t m_k / (sqrt(v_k) + epsilon)
    every H steps:   S_k = the places of the largest entries of |w_k - W|
                     q_k = (w_k - W, m_k - M, v_k - V) at the places S_k                the message
                     (W, M, V) = (W, M, V) + sum_k a_k q_k                              on all ranks alike
                     w_k = W;  m_k = M;  v_k = V

w_k, m_k and v_k (n,) are the model of rank k and its moments, and F_k the loss of its batch; W, M and V (n,) those of
the last exchange, the same on all ranks; H the parameter ``period``; S_k the mask, the same for all three, of
``max(1, floor(ratio n))`` entries, with the ratio of the compressor; a_k what rank k counts in the sum; lr the learning
rate, and alpha_t the same with Adam's bias correction in it (`mpicomp.algorithms.sums.adam`). Products, roots and
quotients are elementwise.

There is no error memory: what a mask leaves out is lost, of the moves of the model as of those of the moments, and of
weight decay, which is part of the local steps. So an entry that never is among the largest of any rank stays where it
is, and a small ratio with ``period = 1`` learns little; with more local steps the moves differ more in length. Averages
keep V >= 0: every rank sends a V >= 0 or leaves the old one.

In a step without a gradient (`mpicomp.replica.distributed.Distributed.step_with_gradients`) a rank keeps its model and
its moments, which t does not count, and takes part in the exchange if there is one.

Without compression and with one rank this is Adam. With ``period = 1`` it is Adam with the mean of the gradients in M,
and the mean of their squares in V, whose steps are averaged over ranks.

From the paper: Adam on each device from the common model and moments, the shared mask for all three, what it is chosen
by (a bound on the distance to central Adam), their average. Its text could not be read beyond the abstract. So these
are this package's reading: that the mask is the top-k of |w_k - W|; where epsilon and weight decay stand; and bias
correction with t the number of local steps of the rank, as if no message had left anything out: M and V of an entry
that was left out are smaller than it assumes, as in Adam's start without correction (``bias_correction = false`` has
none).

Wire: every H steps; star: a worker one message of 12 bytes for each entry of its mask (of float32) and its index once,
about a byte (see `mpicomp.compression.indices`), the hub the sums to each worker, without their zeros; ring: the
messages of all ranks, relayed. Memory: ``m``, ``v``, the copies W, M and V, and while they are averaged three vectors
more. Deng et al. 2024, arXiv 2405.17932.

In a script:

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    gossip = mpicomp.distribute(model, optimizer, FedAdamSSM(TopK(0.05), period=5), topology=star)
    loss = gossip.step(lambda: loss_fn(model, batch))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.algorithms.base import Local, Phases, require_period
from mpicomp.algorithms.sums.adam import OwnAdam, moments_, zero_moments
from mpicomp.algorithms.sums.base import AggregatedAlgorithm
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.indices import index_field, scatter_add_, write_indices
from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.compression.ratio import kept
from mpicomp.compression.topk import TopK
from mpicomp.compression.values import value_fields
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass
class FedAdamSSMState:
    """What a rank keeps.

    Attributes:
        m: (n,) first moment of this rank.
        v: (n,) second moment of this rank.
        common: (3 n,) W, M and V of the last exchange, one behind the other, the same on all ranks.
        steps: steps done, which tell when to exchange.
        local_steps: t, those of them in which there was a gradient.

    """

    m: Tensor
    v: Tensor
    common: Tensor
    steps: int = 0
    local_steps: int = 0


@dataclass(frozen=True)
class FedAdamSSM(OwnAdam[FedAdamSSMState], AggregatedAlgorithm[FedAdamSSMState]):
    """Local steps of Adam, and averages of model and moments under a shared sparse mask.

    Attributes:
        compressor: `TopK` with full values, whose ratio is that of the mask; `Identity` for a mask of all entries.
        period: H, the steps from one exchange to the next.

    """

    ranks_stay_equal: ClassVar[bool] = False  # between two exchanges

    period: int = 5

    def __post_init__(self) -> None:
        OwnAdam.__post_init__(self)
        AggregatedAlgorithm.__post_init__(self)
        require_period(self.period)
        is_top = isinstance(self.compressor, TopK) and self.compressor.values == "full"
        if not (is_top or isinstance(self.compressor, Identity)):
            raise ConfigError(
                f"compression.kind: {self.name} sends model and moments at the places of the largest moves, and takes "
                "of the compressor the ratio alone. Use compression.kind = 'topk' with values = 'full' and without "
                "per_tensor and allocation, or 'identity' for all entries"
            )

    @property
    def keeps_anchor(self) -> bool:
        """Yes, the model of the last exchange."""
        return True

    def init(self, local: Local, exchange: Exchange) -> FedAdamSSMState:
        """Return moments of zero, and copies of these and of the model, once the optimizer is found to fit."""
        self.rank_weights(exchange.size)  # raises what is wrong with them
        self.require_plain_optimizer(local)
        m, v = zero_moments(local)
        return FedAdamSSMState(m, v, torch.cat([local.x, m, v]))

    def phases(self, local: Local, state: FedAdamSSMState, exchange: Exchange) -> Phases:
        """Take a local step, and after every `period` of them exchange, in the order of the module's docstring."""
        yield None
        if not local.skips_update:
            self._local_step(local, state)
        state.steps += 1
        if state.steps % self.period == 0:
            self._average_(local, state, exchange)

    def _local_step(self, local: Local, state: FedAdamSSMState) -> None:
        t = state.local_steps + 1
        moments_(state.m, state.v, local.g, self.beta1, self.beta2)
        self.steps_of_(state.m, state.v, local, (t, t))
        self.decay_(local)
        local.x.sub_(local.g)
        self.tell_optimizer(local)
        state.local_steps = t

    def _average_(self, local: Local, state: FedAdamSSMState, exchange: Exchange) -> None:
        mask = _SharedMask(self.compressor.ratio if isinstance(self.compressor, TopK) else 1.0)
        moved = torch.cat([local.x, state.m, state.v]).sub_(state.common)
        spec = Spec.flat(moved.numel(), moved.dtype)
        q, aggregator = mask.compress(moved, spec, None), Aggregator(exchange)
        aggregator.start(q, mask, spec, self.rank_weights(exchange.size)).wait_on_servers(moved)
        for part in _thirds(moved):
            aggregator.share_(part, local.spec)
        w, m, v = _thirds(state.common.add_(moved))
        v.clamp_min_(0.0)  # a sum of weights may be above 1 by rounding
        local.x.copy_(w)
        state.m.copy_(m)
        state.v.copy_(v)


@dataclass(frozen=True)
class _SharedMask(Compressor):
    """Keep three vectors, one behind the other, at the places of the largest entries of the first.

    Attributes:
        ratio: the fraction of the entries that is kept, in (0, 1].

    """

    ratio: float

    def layout(self, spec: Spec) -> Layout:
        """Return ``values``, ``m`` and ``v``, each (k,), and ``indices``."""
        n = spec.numel // 3
        k = kept(n, self.ratio)
        (values,) = value_fields("full", spec.dtype, k)
        return Layout((values, replace(values, name="m"), replace(values, name="v"), index_field(n, k)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select the largest entries of the first third; raise DivergenceError if it has a NaN."""
        w, m, v = _thirds(x)
        n, k = len(w), kept(len(w), self.ratio)
        values, places = kernels.top_k(w, k)
        return {"values": values, "m": m[places], "v": v[places], **write_indices(places, n, index_field(n, k))}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add the message to the three vectors in `out`."""
        for name, part in zip(("values", "m", "v"), _thirds(out), strict=True):
            scatter_add_(part, payload, payload[name], weight)


def _thirds(x: Tensor) -> list[Tensor]:
    """Return views of the three vectors (n,) in `x` (3 n,)."""
    return list(x.view(3, -1))
