"""WHEN, if nobody waits: what an asynchronous algorithm is.

Every rank goes on at its own pace and talks through a `Mailbox`. `phases`, and `step` which drives it, computes one
gradient if it can, `serve` only takes in what has arrived; none of them waits. The training loop calls them in turn,
with the learning rate of the moment in place, and deals out the batches. As for synchronous algorithms,
hyper-parameters make up a frozen dataclass, and all that changes is in a state of tensors and numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, Meanwhile, require_fraction, require_positive
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Spec
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Exchange, Mailbox
from mpicomp.topology.base import Schedule, Topology

S = TypeVar("S")

Share = Literal["by_speed", "equal"]
"""Who computes how many gradients: all take batches from one queue, or each as many, from samples of its own."""

Attempt = Generator[Meanwhile, None, bool]
"""An attempt at a step that hands over to its caller for the gradient (see `AsynchronousAlgorithm.phases`)."""

DELAYS = 65
"""The length of a histogram of delays; its last place counts all that are longer."""


class ComputingLocal(Local, Protocol):
    """The model of this rank, which computes its gradients itself."""

    def gradient(self, meanwhile: Meanwhile = None) -> Tensor:
        """Forward and backward on the next batch; return `g` (n,)."""


class AsynchronousAlgorithm(ABC, Generic[S]):
    """One method of training on many ranks that do not wait for each other. Subclasses are frozen dataclasses.

    Attributes:
        share: who computes how many gradients.
        compressor: of what it sends.
        ranks_stay_equal: whether all ranks hold the same model after every step.
        updates_with_sum: whether the optimizer's step is made with a sum of gradients over the ranks.
        begins_before_gradient: whether `phases` has work to do before the gradient.
        moves_model_for_gradient: whether the gradient is to be computed at another model than the rank holds between
            steps.

    """

    share: Share
    compressor: Compressor
    ranks_stay_equal: ClassVar[bool] = False
    updates_with_sum: ClassVar[bool] = False
    begins_before_gradient: ClassVar[bool] = True
    moves_model_for_gradient: ClassVar[bool] = False

    @abstractmethod
    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError or ConfigError if this algorithm cannot run on `schedule`."""

    def owners(self, size: int, spec: Spec) -> list[tuple[int, slice]]:
        """Return which rank holds which part of the trained model; none, if it is the mean over all ranks."""
        return []

    def trainers(self, size: int) -> list[int]:
        """Return the ranks that compute gradients, ascending: those that own no part of the model."""
        owners = {rank for rank, _ in self.owners(size, Spec.flat(size))}
        return [rank for rank in range(size) if rank not in owners]

    @property
    def compressors(self) -> tuple[Compressor, ...]:
        """All that messages are compressed with."""
        return (self.compressor,)

    def message_nbytes(self, spec: Spec, size: int) -> int:
        """Return the bytes of the longest message of `size` ranks that train a model of `spec`."""
        parts = [part_of(spec, part) for _, part in self.owners(size, spec)] or [spec]
        return max(compressor.layout(part).nbytes for part in parts for compressor in self.compressors)

    @property
    def depth(self) -> int:
        """How many messages a rank may be ahead of a neighbor that does not read."""
        return 2

    @abstractmethod
    def init(self, local: Local, mailbox: Mailbox) -> S:
        """Return the state at the start of training; all ranks hold the same `local.x`."""

    @abstractmethod
    def phases(self, local: Local, state: S, mailbox: Mailbox) -> Attempt:
        """Go on with a step as far as it goes without waiting; return whether this rank could go on.

        Yields at most once, where the caller is to compute the gradient at ``local.x`` into ``local.g``; what it yields
        serves others meanwhile, and is None if there is nothing to do. Before that, ``local.g`` may hold gradients of
        the caller's and must not be touched. To close the attempt there is to go without a gradient; messages that have
        been sent stay valid.
        """

    def step(self, local: ComputingLocal, state: S, mailbox: Mailbox) -> bool:
        """Compute one gradient and do with it what there is to do; return whether this rank could go on.

        Without a batch to take, the loop no longer calls this on a rank, but `serve`.
        """
        attempt = self.phases(local, state, mailbox)
        while True:
            try:
                meanwhile = next(attempt)
            except StopIteration as end:
                return bool(end.value)
            local.gradient(meanwhile)

    def is_unfinished(self, state: S) -> bool:
        """Return whether a step has its gradient, and another attempt is to finish it."""
        return False

    @abstractmethod
    def awaited(self, state: S, mailbox: Mailbox) -> list[int]:
        """Return the ranks that a step which could not go on waits for."""

    @abstractmethod
    def serve(self, local: Local, state: S, mailbox: Mailbox) -> bool:
        """Take in a piece of what has arrived, without computing a gradient; return whether there was any."""

    def drain(self, local: Local, state: S, mailbox: Mailbox) -> bool:
        """Take in all that has arrived, and return whether there was any; a checkpoint has no messages in it."""
        has_moved = False
        while self.serve(local, state, mailbox):
            has_moved = True
        return has_moved

    @abstractmethod
    def updates(self, state: S) -> int:
        """Return how many gradients this rank has applied to its model so far."""

    def delays(self, state: S, mailbox: Mailbox) -> dict[int, list[int]]:
        """Return, by the rank that sent, how many contributions were 0, 1, ... updates late (DELAYS,)."""
        return {}

    def diagnostics(self, local: Local, state: S) -> dict[str, float]:
        """Return numbers of this rank worth a place in the metrics; no communication."""
        return {}

    @property
    def name(self) -> str:
        """The class name, for messages."""
        return type(self).__name__


class RegroupingAlgorithm(AsynchronousAlgorithm[S]):
    """One whose ranks can go on when some of them have died, because none of them is special."""

    @abstractmethod
    def regroup_(self, local: Local, state: S, mailbox: Mailbox, exchange: Exchange) -> None:
        """Go on with `mailbox`, over another graph of fewer ranks; collective on these.

        What was under way in the old mailbox is lost; `exchange` has the edges of the new one.
        """


AnyAlgorithm = Algorithm[Any] | AsynchronousAlgorithm[Any]


def part_of(spec: Spec, part: slice) -> Spec:
    """Return the spec of a part of the flat model; all of it keeps its tensors."""
    numel = part.stop - part.start
    return spec if numel == spec.numel else Spec.flat(numel, spec.dtype)


def count_delay_(histogram: Tensor, delay: int) -> None:
    """Count one contribution that was `delay` updates late in `histogram` (DELAYS,), int64."""
    histogram[min(max(delay, 0), DELAYS - 1)] += 1


def require_connected(name: str, schedule: Schedule) -> Topology:
    """Return `schedule` if it is one connected graph; raise TopologyError otherwise."""
    if not isinstance(schedule, Topology):
        raise TopologyError(
            f"topology.kind = {schedule.name!r} changes from step to step, but {name} has no common steps: "
            "take a graph that stays as it is"
        )
    if not schedule.is_connected:
        raise TopologyError(
            f"topology.kind = {schedule.name!r}: the graph is not connected, so {name} would train several models "
            "that know nothing of each other. Add edges, or take topology.kind = 'ring'."
        )
    return schedule


@dataclass(frozen=True)
class DelayCompensation:
    """A first-order correction of a gradient that was computed at another model than it is applied to.

        g~ = g(w_old) + lambda_t * g * g * (w - w_old)                                        (eq. 10)
        constant:  lambda_t = lambda0
        adaptive:  MeanSquare = decay MeanSquare + (1 - decay) g * g;  lambda_t = lambda0 / sqrt(MeanSquare + epsilon)

    with elementwise products: the diagonal of g g^T stands for the Hessian. Zheng et al. 2017, arXiv 1609.08326; the
    root is that of the authors' code (Multiverso).

    Attributes:
        lambda0: strength, >= 0; 0 corrects nothing.
        adaptive: whether lambda_t adapts to the size of the gradients.
        decay: of the mean square, in [0, 1).
        epsilon: added below the root, > 0.
        is_limited: whether the correction is shortened to the length of the gradient, where it is longer.

    """

    lambda0: float
    adaptive: bool
    decay: float
    epsilon: float
    is_limited: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lambda0 < math.inf:
            raise ConfigError(f"algorithm.lambda0 = {self.lambda0} must be a finite number >= 0")
        require_fraction(decay=self.decay)
        require_positive(epsilon=self.epsilon)

    def init(self, like: Tensor) -> Tensor | None:
        """Return the mean square (n,) for gradients such as `like` (n,), if one is needed."""
        return torch.zeros_like(like) if self.adaptive else None

    def correct_(self, gradient: Tensor, moved: Tensor, mean_square: Tensor | None) -> Tensor:
        """Correct `gradient` (n,) in place for a model that has moved by `moved` (n,), which is overwritten.

        Returns:
            The length of the correction over that of the gradient as it came, a scalar on the same device.

        """
        if mean_square is not None:
            mean_square.mul_(self.decay).addcmul_(gradient, gradient, value=1 - self.decay)
        moved.mul_(gradient).mul_(gradient)
        if mean_square is not None:
            moved.div_((mean_square + self.epsilon).sqrt_())
        length, correction = gradient.norm(), moved.norm()
        strength = torch.full((), self.lambda0, dtype=gradient.dtype, device=gradient.device)
        if self.is_limited:
            strength = torch.fmin(strength, length / correction.clamp_min(1e-30))
            gradient.addcmul_(moved, strength)  # a number would have to be waited for on a GPU
        else:
            gradient.add_(moved, alpha=self.lambda0)
        ratio: Tensor = strength * correction / length.clamp_min(1e-30)
        return ratio
