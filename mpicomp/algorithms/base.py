"""WHEN to compute and when to talk: what an algorithm is, and what it may do with the model of its rank.

An algorithm is a frozen dataclass of hyper-parameters; its compressor, where it has one, is one of them. What changes
lives in its state, a dataclass of tensors and numbers made by `Algorithm.init` and changed in place by
`Algorithm.phases`. Whatever a restart needs is a field of that state, so one generic code (`mpicomp.state`)
stores and restores the state of every algorithm. No message is in flight between two steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Spec
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Schedule, Topology

S = TypeVar("S")

Meanwhile = Callable[[], bool] | None
"""What moves messages behind a computation: called now and then until it returns true. None if there are none."""

Phases = Iterator[Meanwhile]
"""A step that hands over to its caller once, for the gradient (see `Algorithm.phases`)."""


class Local(Protocol):
    """The model of this rank.

    Attributes:
        x: (n,) the flat parameters; changing them changes the model.
        g: (n,) the flat gradient, which `update` uses.
        spec: the tensors of which `x` is made.

    """

    x: Tensor
    g: Tensor
    spec: Spec

    @property
    def groups(self) -> Sequence[tuple[slice, Mapping[str, Any]]]:
        """The parts of `x`, in order, each with the optimizer's group of its parameters: ``"lr"``, ``"weight_decay"``.

        A group whose parameters lie apart in `x` comes once for each part.
        """

    @property
    def momentum(self) -> float:
        """The momentum of the optimizer, 0 if it has none."""

    @property
    def optimizer_classes(self) -> list[type[Optimizer]]:
        """The class of the optimizer, or of each if there are several."""

    @property
    def skips_update(self) -> bool:
        """Whether `update` does nothing, because this rank has no gradient in this step."""

    def norm(self, x: Tensor) -> Tensor:
        """Return the Euclidean norm, a scalar, of a whole vector of the model, of which `x` is the part held here.

        A rank whose node has several holds a shard of each vector (collective on the ranks of the node).
        """

    def update(self, part: slice | None = None) -> None:
        """Take the optimizer's step on `x` with `g`; only on the tensors that `part` touches, if it is given."""


class Algorithm(ABC, Generic[S]):
    """One method of training on many ranks. Subclasses are frozen dataclasses and final.

    Attributes:
        ranks_stay_equal: whether all ranks hold the same model after every step.
        updates_with_sum: whether the optimizer's step is made with a sum of gradients over the ranks.

    """

    ranks_stay_equal: ClassVar[bool] = False
    updates_with_sum: ClassVar[bool] = False

    def check(self, schedule: Schedule) -> None:
        """Raise TopologyError or ConfigError if this algorithm cannot run on `schedule`.

        By default every graph will do whose averaging preserves the mean.
        """
        topology = schedule(0)
        if not topology.is_doubly_stochastic:
            why = (
                f"rows of its weights do not sum to one, so {self.name} would not even keep models that are equal"
                if topology.is_column_stochastic
                else f"columns of its weights do not sum to one, so {self.name} would drift to a weighted mean"
            )
            raise TopologyError(
                f"topology.kind = {schedule.name!r}: the {why}. Use topology.weights = 'metropolis'; on a directed "
                "graph whose degrees differ, topology.weights = 'push' and algorithm.kind = 'sgp'."
            )

    @abstractmethod
    def init(self, local: Local, exchange: Exchange) -> S:
        """Return the state at the start of training; all ranks hold the same `local.x`."""

    @abstractmethod
    def phases(self, local: Local, state: S, exchange: Exchange) -> Phases:
        """Do one step of training, but for the gradient (collective on all ranks).

        Yields exactly once, where the caller is to compute the gradient at ``local.x`` into ``local.g``; what it yields
        moves messages meanwhile. Before that, ``local.g`` may hold gradients of the caller's and must not be touched.
        """

    @property
    def begins_before_gradient(self) -> bool:
        """Whether `phases` has work to do before the gradient, such as sending messages that travel behind it."""
        return bool(getattr(self, "overlap", False))

    @property
    def moves_model_for_gradient(self) -> bool:
        """Whether the gradient is to be computed at another model than the rank holds between steps."""
        return False

    @property
    def keeps_anchor(self) -> bool:
        """Whether the state has a model from which the next ones are made, so that one loaded by the user is undone."""
        return False

    @property
    def tolerates_loss(self) -> bool:
        """Whether the ranks still agree, if approximately, when messages are lost, and when ranks leave and come back.

        `Pending.wait` then returns what has arrived, and `skip` is there.
        """
        return False

    def skip(self, state: S) -> None:
        """Count a step in which this rank is away: it computes nothing, and neither sends nor receives."""
        raise NotImplementedError(f"{self.name} has tolerates_loss, and must have skip() for the steps of absent ranks")

    def follow_rates(self, local: Local, state: S) -> None:
        """Bring what `state` holds in the unit of a learning rate to the rates of now, as the next step does itself.

        Called while parameters are frozen, whose error memory has no part in the step. By default nothing has such a
        unit.
        """

    def diagnostics(self, local: Local, state: S) -> dict[str, float]:
        """Return numbers of this rank worth a place in the metrics; no communication.

        Of synchronous methods, the metrics have the mean over the ranks that give a number.
        """
        return {}

    @property
    def name(self) -> str:
        """The class name, for messages."""
        return type(self).__name__


def require_fixed_symmetric(name: str, schedule: Schedule) -> None:
    """Raise TopologyError unless `schedule` is one undirected graph with symmetric weights."""
    if not isinstance(schedule, Topology):
        raise TopologyError(
            f"topology.kind = {schedule.name!r} changes from step to step, but {name} keeps a sum over a fixed "
            "neighborhood. Use a fixed graph, or algorithm.kind = 'dpsgd' or 'deep_squeeze'."
        )
    require_symmetric(name, schedule)


def require_symmetric(name: str, schedule: Schedule) -> None:
    """Raise TopologyError unless the first graph of `schedule` is undirected and has symmetric weights."""
    if not schedule(0).is_symmetric:
        raise TopologyError(
            f"topology.kind = {schedule.name!r} has a directed graph or asymmetric weights, but {name} needs symmetric "
            "ones. Use an undirected graph with topology.weights = 'metropolis', or algorithm.kind = 'dpsgd' or 'sgp'."
        )


def require_no_feedback(name: str, compressor: Compressor, section: str = "compression") -> None:
    """Raise ConfigError if `compressor` remembers its errors: a method that sends them again by itself diverges."""
    if compressor.remembers_errors:
        raise ConfigError(
            f"{section}.error_feedback = true: {name} sends by itself what a message has left out, and would "
            "count every error twice. Leave it out."
        )


def require_bounded_errors(name: str, compressor: Compressor, section: str = "compression") -> None:
    """Raise ConfigError if what a method remembers of errors would be counted twice, or grow without bound."""
    require_no_feedback(name, compressor, section)
    if compressor.amplifies:
        raise ConfigError(
            f"{section}: {name} sends by itself what a message has left out, and with {compressor} that grows without "
            f"bound. Set {section}.contractive = true ('qsgd', 'terngrad') or {section}.unbiased = false ('randk'), or "
            f"choose another compressor, such as {section}.kind = 'topk'"
        )


def require_period(period: int) -> None:
    """Raise ConfigError unless `period` is at least 1."""
    if period < 1:
        raise ConfigError(f"algorithm.period = {period} must be at least 1: the steps between two exchanges")


def require_fraction(**values: float) -> None:
    """Raise ConfigError for the first of `values` (keys of the section ``algorithm``) that is not in [0, 1)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"algorithm.{key} = {value} must be in [0, 1)")


def require_share(**values: float) -> None:
    """Raise ConfigError for the first of `values` (keys of the section ``algorithm``) that is not in (0, 1]."""
    for key, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"algorithm.{key} = {value} must be in (0, 1]")


def require_positive(**values: float) -> None:
    """Raise ConfigError for the first of `values` (keys of the section ``algorithm``) that is not finite and > 0."""
    for key, value in values.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"algorithm.{key} = {value} must be a finite number > 0")
