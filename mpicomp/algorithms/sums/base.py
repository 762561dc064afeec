"""What the methods that add up the compressed gradients of all ranks share.

All ranks hold the same model: each adds the same weighted sum, formed over a star or a ring
(`mpicomp.exchange.sums.aggregate`). Batch-norm statistics are each rank's own in training. Weight decay is the
optimizer's, which adds the same on all ranks; it is not compressed. DGC and EF-SGD with momentum give it that momentum
(`add_decay_momentum_`).

EF-SGD, GMC and DGC form a message from the next gradient and what is left of the last ones, and the model moves by the
sum of the messages. In step k:

    p_k = what is left of p_{k-1}, and the gradient at x_k
    q_k = C(p_k)                                           the message of this rank
    Q_k = sum_i w_i q_k of rank i                          the sum over all ranks
    x_{k+1} = x_k - lr_k u(Q_k)                            on all ranks alike

With ``overlap`` (`GradientSum`) the messages travel behind the next gradient, and the sum comes one step later:

    start the sum Q_{k-1};  gradient at x_k, added to p_k
    wait for Q_{k-1};  x_{k+1} = x_k - lr_k u(Q_{k-1})     k = 0: nothing is sent, and x_1 = x_0
    q_k = C(p_k), kept for the next step

x_k is the model (n,) before step k; C the compressor; w_i what rank i counts, ``1 / size`` or its part of the samples;
lr_k the learning rate of step k; u(Q) the direction that the optimizer makes of the sum, as it makes one of a gradient.

The entries of a frozen parameter have no part in a step: error memory and moments wait until it is thawed
(`mpicomp.state.waiting`). With ``overlap``, what the message under way holds of it when it is frozen is lost.

Nothing is in flight between steps: q_k is part of the state, packed, and a checkpoint holds it. What it costs: the
model moves by gradients that are one step old, so the largest learning rate is smaller (on a quadratic of curvature L,
SGD without momentum is stable below 1 / L instead of 2 / L). The sum of a relay or an all-reduce is many exchanges, one
after the other: each begins between two layers of the model. The message of the last step of a run is never sent. All
ranks hold the same model after each step, which is the one that is evaluated and stored. Memory: the packed message; on
the hub of a star one vector more while the sum is under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, require_bounded_errors
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator, PendingAverage, star_or_ring_of
from mpicomp.topology.base import Schedule

S = TypeVar("S")

Weights = Literal["equal", "volume"]
"""What a rank counts in the sum: ``1 / size``, or its part of the samples."""


class SummingAlgorithm(Algorithm[S]):
    """A method that adds up something of all ranks, over a star or a ring."""

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError unless `schedule` is a star or a ring."""
        star_or_ring_of(schedule)


@dataclass(frozen=True)
class AggregatedAlgorithm(SummingAlgorithm[S]):
    """A method that adds up compressed gradients.

    Attributes:
        compressor: any contractive compressor; the method remembers what it leaves out.
        weights: what a rank counts: ``"equal"``, or by its ``"volume"``.
        volumes: the samples of each rank, for ``"volume"``; a configured run fills them in.

    """

    ranks_stay_equal: ClassVar[bool] = True

    compressor: Compressor = Identity()
    weights: Weights = "equal"
    volumes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_bounded_errors(self.name, self.compressor)
        if self.weights not in get_args(Weights):
            words = ", ".join(map(repr, get_args(Weights)))
            raise ConfigError(f"algorithm.weights = {self.weights!r} must be one of {words}")
        empty = [rank for rank, volume in enumerate(self.volumes) if volume <= 0]
        if empty:
            raise ConfigError(
                f"algorithm.volumes: rank {empty[0]} has {self.volumes[empty[0]]} samples, and so no weight: give it "
                "some, or set algorithm.weights = 'equal'"
            )

    def rank_weights(self, size: int) -> list[float] | None:
        """Return what each of `size` ranks counts, ``volumes[i] / sum(volumes)``; None for ``1 / size``.

        Raises:
            ConfigError: not one volume for each rank.

        """
        if self.weights == "equal":
            return None
        if len(self.volumes) != size:
            raise ConfigError(
                f"algorithm.weights = 'volume' needs the number of samples of each of {size} ranks in "
                f"algorithm.volumes: {len(self.volumes)} are given"
            )
        return [volume / sum(self.volumes) for volume in self.volumes]


class GradientSumState(Protocol):
    """What the state of a `GradientSum` has.

    Attributes:
        delayed: (nbytes,) uint8, room for the longest message, with that of the last step in it; None without overlap.
        steps: how many messages have been formed.

    """

    delayed: Tensor | None
    steps: int


def decay_momentum(name: str, local: Local, momentum: float) -> Tensor | None:
    """Return a momentum of the weight decay of zero, (n,); None if there is no momentum or no weight decay in `g`.

    Raises:
        ConfigError: there is one, and the optimizer changes the sign of what it gets.

    """
    if not momentum or not any(_decay_of_gradient(group) for _, group in local.groups):
        return None
    require_minimizing(name, local)
    return torch.zeros_like(local.x)


def _decay_of_gradient(group: Mapping[str, Any]) -> float:
    """Return the weight decay that the optimizer makes a part of the gradient: 0 if it is decoupled, as AdamW's.

    AdamW has a mark in its groups; groups of Muon and Adafactor, whose decay is always decoupled, have keys of theirs.
    """
    if group.get("decoupled_weight_decay") or "ns_steps" in group or "beta2_decay" in group:
        return 0.0
    return float(group.get("weight_decay", 0.0))


def add_decay_momentum_(local: Local, b: Tensor, momentum: float, nesterov: bool = False) -> None:
    """Give weight decay a momentum, ahead of the optimizer, which adds ``weight_decay x`` to ``local.g`` by itself.

    ``b = momentum b + weight_decay x``, and ``g = g + b``, or with Nesterov's ``g = g + weight_decay x + momentum b``.
    Ranks hold equal models, so b is the same on all. It stays zero where the decay is no part of the gradient (AdamW).
    """
    for part, group in local.groups:
        decay = _decay_of_gradient(group)
        mine = b[part].mul_(momentum)
        if nesterov:
            local.g[part].add_(mine.add_(local.x[part], alpha=decay), alpha=momentum)
        else:
            local.g[part].add_(mine)
            mine.add_(local.x[part], alpha=decay)


G = TypeVar("G", bound=GradientSumState)


@dataclass(frozen=True)
class GradientSum(AggregatedAlgorithm[G]):
    """A method whose model moves by the sum of the messages, as above.

    Its `phases` begins with `start_delayed_sum` and ends with `sum_and_update`. In between it computes the gradient,
    forms p_k, calls `update_with_delayed_sum` and compresses p_k to q_k.

    Attributes:
        overlap: whether the messages travel behind the next gradient, and the sum comes one step later.

    """

    updates_with_sum: ClassVar[bool] = True

    overlap: bool = False

    def compressor_at(self, step: int) -> Compressor:
        """Return the compressor of a step, the same in all of them unless a method says otherwise."""
        return self.compressor

    def init_delayed(self, local: Local, steps: Sequence[int] = (0,)) -> Tensor | None:
        """Return room for the messages of these steps; None without overlap."""
        return self.room_for([self.compressor_at(step).layout(local.spec) for step in steps], local)

    def room_for(self, layouts: Sequence[Layout], local: Local) -> Tensor | None:
        """Return room for a message of any of these layouts; None without overlap."""
        if not self.overlap:
            return None
        nbytes = max(layout.nbytes for layout in layouts)
        return torch.zeros(nbytes, dtype=torch.uint8, device=local.x.device)

    def reader(self, step: int, local: Local, state: G) -> tuple[Compressor, Spec]:
        """Return what reads the messages of a step, and the spec of their sum."""
        return self.compressor_at(step), local.spec

    def receive(self, pending: PendingAverage, local: Local, state: G) -> None:
        """Wait for a sum, and put it in ``local.g``."""
        pending.wait(local.g)

    def start_delayed_sum(self, local: Local, state: G, exchange: Exchange) -> PendingAverage | None:
        """Begin ``Q_{k-1} = sum_i w_i q_{k-1}`` with the message of the last step; None in the first, or no overlap."""
        if state.delayed is None or state.steps == 0:
            return None
        compressor, spec = self.reader(state.steps - 1, local, state)
        return self._start_sum(compressor.layout(spec).unpack(state.delayed), compressor, spec, exchange)

    def update(self, local: Local, state: G) -> None:
        """Take the optimizer's step with the sum in ``local.g``."""
        local.update()

    def update_with_delayed_sum(self, delayed: PendingAverage | None, local: Local, state: G) -> None:
        """``x_{k+1} = x_k - lr_k u(Q_{k-1})``, which overwrites ``local.g``; nothing if there is no `delayed` sum."""
        if delayed is not None:
            self.receive(delayed, local, state)
            self.update(local, state)

    def sum_and_update(self, q: Payload, local: Local, state: G, exchange: Exchange) -> None:
        """``Q_k = sum_i w_i q_k;  x_{k+1} = x_k - lr_k u(Q_k)``; with overlap, keep `q` for the next step instead."""
        compressor, spec = self.reader(state.steps, local, state)
        if state.delayed is None:
            self.receive(self._start_sum(q, compressor, spec, exchange), local, state)
            self.update(local, state)
        else:
            compressor.layout(spec).pack(q, state.delayed)
        state.steps += 1

    def _start_sum(self, q: Payload, compressor: Compressor, spec: Spec, exchange: Exchange) -> PendingAverage:
        return Aggregator(exchange).start(q, compressor, spec, self.rank_weights(exchange.size))


def require_sgd(name: str, local: Local) -> None:
    """Raise ConfigError unless the optimizer is `torch.optim.SGD`: the method makes its steps by itself."""
    if others := [kind.__name__ for kind in local.optimizer_classes if not issubclass(kind, torch.optim.SGD)]:
        raise ConfigError(
            f"optimizer.kind = {others[0]!r}: {name} makes the direction of its steps by itself, which another "
            "optimizer than SGD would change, or have no part in. Use optimizer.kind = 'sgd' (torch.optim.SGD) without "
            "momentum"
        )


def require_minimizing(name: str, local: Local) -> None:
    """Raise ConfigError if the optimizer is to maximize: it would change the sign of what the method adds to `g`."""
    if any(group.get("maximize") for _, group in local.groups):
        raise ConfigError(
            f"optimizer.maximize = True: {name} makes a part of its steps by itself, or all of them, and downhill. "
            "Change the sign of the loss"
        )


def require_no_momentum(name: str, local: Local) -> None:
    """Raise ConfigError if the optimizer has momentum: the method has its own, ahead of the compression.

    Called in every step, because a scheduler may turn momentum on, as OneCycleLR does by default.
    """
    if local.momentum:
        raise ConfigError(
            f"optimizer.momentum = {local.momentum:g} (or its betas): {name} has a momentum of its own, ahead of the "
            "compression, and would count it twice. Use optimizer.kind = 'sgd' with momentum 0, and "
            "algorithm.momentum. If a scheduler sets it, leave that out: OneCycleLR(..., cycle_momentum=False)."
        )
