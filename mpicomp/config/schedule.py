"""The learning rate as a pure function of progress: ``lr = optimizer.lr * schedule(epoch)``.

Progress is measured in epochs and may be fractional, so that one schedule serves every number of ranks. A run given in
steps counts ``step / steps_per_epoch`` epochs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from mpicomp.errors import ConfigError


@dataclass(frozen=True)
class LearningRateSchedule(ABC):
    """A factor for the learning rate, with an optional linear warmup.

    For ``epoch < warmup`` the factor is ``(s + (1 - s) * epoch / warmup) * shape(epoch)`` with ``s = warmup_start``
    (Goyal et al. 2017, arXiv 1706.02677, section 2.2), afterwards ``shape(epoch)``.

    Attributes:
        epochs: the length of the run; positive.
        warmup: the epochs of warmup, in ``[0, epochs]``; 0 for none.
        warmup_start: the fraction of the learning rate at which warmup starts, in ``[0, 1]``.

    Raises:
        ConfigError: a value is out of its range.

    """

    epochs: float
    warmup: float = 0.0
    warmup_start: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ConfigError(f"training.epochs = {self.epochs:g}: a run must have a positive length.")
        if not 0 <= self.warmup <= self.epochs:
            raise ConfigError(
                f"schedule.warmup = {self.warmup:g}: must be between 0 and the {self.epochs:g} epochs of the run. "
                "For a short run, --set schedule.warmup=0"
            )
        if not 0 <= self.warmup_start <= 1:
            raise ConfigError(f"schedule.warmup_start = {self.warmup_start:g}: must be between 0 and 1.")

    def __call__(self, epoch: float) -> float:
        """Return the factor after `epoch` epochs (fractional, from 0)."""
        if epoch >= self.warmup:
            return self.shape(epoch)
        return (self.warmup_start + (1 - self.warmup_start) * epoch / self.warmup) * self.shape(epoch)

    @abstractmethod
    def shape(self, epoch: float) -> float:
        """Return the factor after `epoch` epochs, without warmup."""


@dataclass(frozen=True)
class Constant(LearningRateSchedule):
    """``shape = 1``."""

    def shape(self, epoch: float) -> float:
        """Return 1 for every epoch."""
        return 1.0


@dataclass(frozen=True)
class Step(LearningRateSchedule):
    """``shape = factor ** (number of milestones reached)``.

    Attributes:
        milestones: ascending; a value below 1 is a fraction of the run, a value from 1 on is an epoch.
        factor: positive.

    """

    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(f"schedule.factor = {self.factor:g}: must be positive.")
        if not all(0 < milestone <= self.epochs or 0 < milestone < 1 for milestone in self.milestones):
            raise ConfigError(
                f"schedule.milestones = {list(self.milestones)}: each must be a fraction of the run (below 1) or "
                f"one of its {self.epochs:g} epochs."
            )
        if list(self.reached_at) != sorted(set(self.reached_at)):
            raise ConfigError(f"schedule.milestones = {list(self.milestones)}: must be ascending.")

    @property
    def reached_at(self) -> tuple[float, ...]:
        """The milestones in epochs."""
        return tuple(m * self.epochs if m < 1 else m for m in self.milestones)

    def shape(self, epoch: float) -> float:
        """Return `factor` to the power of the milestones reached."""
        return self.factor ** sum(epoch >= milestone for milestone in self.reached_at)


@dataclass(frozen=True)
class Cosine(LearningRateSchedule):
    """``shape = floor + (1 - floor) * (1 + cos(pi * t)) / 2``, t from 0 to 1 between warmup and the end.

    Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts.

    Attributes:
        floor: the factor at the end, in ``[0, 1]``.

    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"schedule.floor = {self.floor:g}: must be between 0 and 1.")

    def shape(self, epoch: float) -> float:
        """Return the cosine between 1 and `floor`."""
        length = self.epochs - self.warmup
        t = min(max((epoch - self.warmup) / length, 0.0), 1.0) if length > 0 else 0.0
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * t)) / 2


SCHEDULES: dict[str, type[LearningRateSchedule]] = {"constant": Constant, "step": Step, "cosine": Cosine}
