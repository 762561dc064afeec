"""WHEN to compute and when to talk: what an algorithm is, and what it may do with the model of its rank.

An algorithm is a frozen dataclass of hyper-parameters (its compressor is one of them). What changes lives in its
state, a dataclass of tensors and numbers made by `init` and changed in place by `step`; whatever a restart needs is a
field of it, so that one generic code stores and restores the state of all algorithms.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from mpicomp.compression.base import Compressor, Spec
from mpicomp.compression.identity import Identity
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule, Topology

S = TypeVar("S")


class Local(Protocol):
    """The model of this rank.

    Attributes:
        x: (n,) the flat parameters; changing them changes the model.
        spec: the tensors of which `x` is made.
        lr: the learning rate of the current step.

    """

    x: Tensor
    spec: Spec

    @property
    def lr(self) -> float:
        """The learning rate of the current step."""

    def gradient(self) -> Tensor:
        """Forward and backward on the next batch; return the flat gradient (n,), which `update` will use."""

    def update(self) -> None:
        """Take the optimizer's step on `x` with the flat gradient."""


class Algorithm(ABC, Generic[S]):
    """One method of training on many ranks. Subclasses are frozen dataclasses and final."""

    @property
    def compressor(self) -> Compressor:
        """The compressor of what is sent; a field in algorithms that compress."""
        return Identity()

    def check(self, schedule: Schedule) -> None:  # noqa: B027  (most algorithms take any graph)
        """Raise TopologyError or ConfigError if this algorithm cannot run on `schedule`."""

    @abstractmethod
    def init(self, local: Local, exchange: Exchange) -> S:
        """Return the state at the start of training; all ranks hold the same `local.x`."""

    @abstractmethod
    def step(self, local: Local, state: S, exchange: Exchange) -> None:
        """Do one step of training (collective on all ranks)."""

    def diagnostics(self, local: Local, state: S) -> dict[str, float]:
        """Return numbers of this rank worth a place in the metrics; no communication."""
        return {}


def require_fixed(name: str, schedule: Schedule) -> Topology:
    """Return the one graph of `schedule`; raise TopologyError if it varies with time."""
    if not isinstance(schedule, Topology):
        raise TopologyError(
            f"topology.kind = {schedule.name!r} changes from step to step, but algorithm.kind = {name!r} keeps sums over "
            "a fixed neighborhood. Use a fixed graph, or 'dpsgd' or 'deep_squeeze'."
        )
    return schedule


def require_doubly_stochastic(name: str, schedule: Schedule) -> None:
    """Raise TopologyError if averaging over `schedule` would not preserve the mean."""
    if not schedule(0).is_doubly_stochastic:
        raise TopologyError(
            f"topology.kind = {schedule.name!r}: its columns do not sum to one, so algorithm.kind = {name!r} would drift to "
            "a weighted mean. Use topology.weights = 'metropolis'."
        )


def require_symmetric(name: str, schedule: Schedule) -> None:
    """Raise TopologyError if `schedule` is directed."""
    require_doubly_stochastic(name, schedule)
    if not schedule(0).is_symmetric:
        raise TopologyError(
            f"topology.kind = {schedule.name!r} is a directed graph, but algorithm.kind = {name!r} needs symmetric weights. "
            "Use an undirected graph, or 'dpsgd'."
        )


def require_positive(**values: float) -> None:
    """Raise ConfigError for the first of `values` that is not a finite number above zero."""
    for key, value in values.items():
        if not (0 < value < float("inf")):
            raise ConfigError(f"{key} = {value} must be a finite number > 0")
