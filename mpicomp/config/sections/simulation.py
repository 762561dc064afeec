"""Ranks that are slow on purpose, and simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mpicomp.config.sections.base import Section, Values
from mpicomp.exchange.loopback.network import Links
from mpicomp.replica.gradient_delay import GradientDelay, Spread
from mpicomp.topology.absence import Absences

_Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Bandwidth = Annotated[float, Field(gt=0)]


class SlowSection(Section):
    """``[slow]``: ranks that are made slow on purpose, to measure what a method gains with ranks of unequal speed."""

    section: ClassVar[str] = "slow"

    ranks: list[NonNegativeInt] = Field(default_factory=list)
    """The ranks whose gradients take longer; ranks that the run does not have are ignored."""

    factor: _Factor | list[_Factor] = 1.0
    """The factor by which gradients take longer (of the host's time, so use `seconds` on a GPU); or a list, one
    for each of `ranks`."""

    seconds: _Seconds | list[_Seconds] = 0.0
    """Seconds by which gradients take longer in addition; or a list, one for each of `ranks`."""

    spread: Spread = "fixed"
    """The distribution of the additional time: ``"fixed"``, ``"jitter"`` (within 5 %), or with this mean ``"uniform"``
    or ``"exponential"``."""

    @model_validator(mode="after")
    def _one_for_each(self) -> SlowSection:
        for key, value in (("factor", self.factor), ("seconds", self.seconds)):
            if isinstance(value, list) and len(value) != len(self.ranks):
                raise ValueError(f"needs as many slow.{key} as slow.ranks, or one number: {len(value)} are given")
        return self

    def build(self, rank: int, seed: int, simulation: SimulationSection | None) -> GradientDelay:
        """Return the `GradientDelay` of `rank`, in real time, or in simulated time if `simulation` is given."""
        simulated = {} if simulation is None else simulation.gradient()
        if rank not in self.ranks:
            return GradientDelay(seed=seed, rank=rank, **simulated)
        place = self.ranks.index(rank)
        factor, seconds = (v[place] if isinstance(v, list) else v for v in (self.factor, self.seconds))
        return GradientDelay(factor, seconds, self.spread, seed, rank, **simulated)


class SimulationSection(Section):
    """``[simulation]``: the durations of gradients and messages with ``--simulate``, and what goes wrong."""

    section: ClassVar[str] = "simulation"

    gradient_s: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The mean time of a gradient, in seconds, with what a rank computes beside it: compression and update. The section
    ``[slow]`` makes it longer."""

    spread: Spread = "fixed"
    """The distribution of the time: ``"fixed"``, or with this mean ``"jitter"`` (within 5 %), ``"uniform"`` (from zero
    to twice the mean) or ``"exponential"``."""

    latency_s: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Seconds from the end of sending a message to its arrival."""

    bytes_per_s: _Bandwidth | list[_Bandwidth] = float("inf")
    """The bandwidth of a node's link to the network, in each direction: 12.5e6 for 100 Mbit/s; or one for each node."""

    node_size: PositiveInt = 1
    """How many consecutive ranks share a link to the network. Messages between them take no time."""

    loss: float = Field(0.0, ge=0, lt=1)
    """The probability of each message to be lost."""

    churn: str | None = None
    """A CSV file that says which ranks leave and come back, and after how many steps: ``rank,leaves,returns``."""

    @property
    def fault(self) -> str:
        """What goes wrong, as key and value, e.g. ``"simulation.loss = 0.1"``; empty if nothing does."""
        if self.churn is not None:
            return f"simulation.churn = {self.churn!r}"
        return f"simulation.loss = {self.loss!r}" if self.loss else ""

    def gradient(self) -> Values:
        """Return the arguments for `GradientDelay` that set simulated time."""
        return {"gradient_s": self.gradient_s, "gradient_spread": self.spread}

    def links(self) -> Links:
        """Return the simulated network."""
        if isinstance(self.bytes_per_s, list):
            return Links(self.latency_s, node_size=self.node_size, bytes_per_s_of_nodes=tuple(self.bytes_per_s))
        return Links(self.latency_s, self.bytes_per_s, self.node_size)

    def absences(self, size: int) -> Absences:
        """Return which of `size` ranks are away when; raise ConfigError, with file and line, if `churn` is wrong."""
        return Absences() if self.churn is None else Absences.read(Path(self.churn), size)
