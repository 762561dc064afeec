"""What the methods that add up the compressed gradients of all ranks share.

All ranks hold the same model: each adds the same weighted sum, formed over a star or a ring (`exchange.aggregate`).
Batch-norm statistics are each rank's own. Weight decay is best left to the optimizer, which adds the same on all ranks.

EF-SGD, GMC and DGC form a message from the next gradient and what is left of the last ones, and the model moves by the
sum of the messages:

    p_k = what is left of p_{k-1}, and the gradient at x_k
    q_k = C(p_k);  Q_k = sum_i w_i q_k of rank i
    x_{k+1} = x_k - lr_k u(Q_k)                            u: the optimizer, on all ranks alike

With ``overlap`` (`GradientSum`) the messages travel behind the next gradient, and the sum comes one step later:

    begin the sum Q_{k-1};  gradient at x_k, added to p_k
    wait for Q_{k-1};  x_{k+1} = x_k - lr_k u(Q_{k-1})     k = 0: nothing is sent, and x_1 = x_0
    q_k = C(p_k), kept for the next step

Nothing is in flight between steps: q_k is part of the state, packed, and a checkpoint holds it. What it costs: the
model moves by gradients that are one step old, so the largest learning rate is smaller (on a quadratic of curvature L,
SGD without momentum is stable below 1 / L instead of 2 / L). The sum of a relay or an all-reduce is many exchanges, one
after the other: each begins between two layers of the model. The message of the last step of a run is never sent. All
ranks hold the same model after each step, which is the one that is evaluated and stored. Memory: the packed message; on
the hub of a star one vector more while the sum is under way.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, Meanwhile, Phases, require_no_feedback
from mpicomp.compression.base import Compressor
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Payload
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.exchange.sums.aggregate import Aggregator, PendingAverage, plan
from mpicomp.topology.base import Schedule

S = TypeVar("S")

Weights = Literal["equal", "volume"]
"""What a rank counts in the sum: ``1 / size``, or its part of the samples."""


@dataclass(frozen=True)
class AggregatedAlgorithm(Algorithm[S]):
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
        require_no_feedback(self.name, self.compressor)
        if self.weights not in get_args(Weights):
            words = ", ".join(map(repr, get_args(Weights)))
            raise ConfigError(f"algorithm.weights = {self.weights!r} must be one of {words}")
        empty = [rank for rank, volume in enumerate(self.volumes) if volume <= 0]
        if empty:
            raise ConfigError(
                f"algorithm.volumes: rank {empty[0]} has {self.volumes[empty[0]]} samples, and so no weight: give it "
                "some, or set algorithm.weights = 'equal'"
            )

    def check(self, schedule: Schedule) -> None:
        """Need a star or a ring."""
        plan(schedule)

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


G = TypeVar("G", bound=GradientSumState)


@dataclass(frozen=True)
class GradientSum(AggregatedAlgorithm[G]):
    """A method whose model moves by the sum of the messages, as above.

    Attributes:
        overlap: whether the messages travel behind the next gradient, and the sum comes one step later.

    """

    updates_with_sum: ClassVar[bool] = True

    overlap: bool = False

    @abstractmethod
    def add_gradient_(self, local: Local, state: G, exchange: Exchange, meanwhile: Meanwhile = None) -> Phases:
        """Yield `meanwhile` for the next gradient and add it to what is to be sent; the model stays where it is."""

    @abstractmethod
    def form_message(self, local: Local, state: G) -> Payload:
        """Return the message of this step, and keep what it leaves out."""

    def compressor_at(self, step: int) -> Compressor:
        """Return the compressor of a step."""
        return self.compressor

    def init_delayed(self, local: Local, steps: Sequence[int] = (0,)) -> Tensor | None:
        """Return room for the messages of these steps; None without overlap."""
        if not self.overlap:
            return None
        nbytes = max(self.compressor_at(step).layout(local.spec).nbytes for step in steps)
        return torch.zeros(nbytes, dtype=torch.uint8, device=local.x.device)

    def phases(self, local: Local, state: G, exchange: Exchange) -> Phases:
        """Do one step in the order of this module's docstring."""
        if state.delayed is not None:
            yield from self._step_behind(local, state, exchange, state.delayed)
            return
        yield from self.add_gradient_(local, state, exchange)
        self._begin(self.form_message(local, state), state.steps, local, exchange).wait(local.g)
        local.update()
        state.steps += 1

    def _step_behind(self, local: Local, state: G, exchange: Exchange, delayed: Tensor) -> Phases:
        if state.steps:
            last = state.steps - 1
            payload = self.compressor_at(last).layout(local.spec).unpack(delayed)
            pending = self._begin(payload, last, local, exchange)
            yield from self.add_gradient_(local, state, exchange, pending.test)
            pending.wait(local.g)
            local.update()
        else:
            yield from self.add_gradient_(local, state, exchange)
        payload = self.form_message(local, state)
        self.compressor_at(state.steps).layout(local.spec).pack(payload, delayed)
        state.steps += 1

    def _begin(self, payload: Payload, step: int, local: Local, exchange: Exchange) -> PendingAverage:
        weights = self.rank_weights(exchange.size)
        return Aggregator(exchange).start(payload, self.compressor_at(step), local.spec, weights)


def require_no_momentum(name: str, local: Local) -> None:
    """Raise ConfigError if the optimizer has momentum: the method has its own, ahead of the compression."""
    if local.momentum:
        raise ConfigError(
            f"optimizer.momentum = {local.momentum:g} (or its betas): {name} has a momentum of its own, ahead of the "
            "compression, and would count it twice. Use optimizer.kind = 'sgd' with momentum 0, and "
            "algorithm.momentum."
        )


def require_momentum(momentum: float) -> None:
    """Raise ConfigError unless `momentum` is in [0, 1)."""
    if not 0 <= momentum < 1:
        raise ConfigError(f"algorithm.momentum = {momentum} must be in [0, 1)")
