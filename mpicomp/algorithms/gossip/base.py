"""What gossip methods share: a step is the optimizer's own, and then a mixing with the neighbors.

    y_i = x_i - lr u_i          the local step
    x_i = mix(y_i)              the method: messages to the neighbors, and a move towards their models

`mix` has no gradient in it, so that another method may go around it and mix less often (`LocalSGD`, `DiLoCo`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container

from mpicomp.algorithms.base import Algorithm, Local, Phases, S
from mpicomp.compression.base import Compressor
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange
from mpicomp.topology.base import Topology

SMALLEST_RATE = 0.01
"""The part of a group's largest learning rate so far below which nothing is divided by its rate."""


class Gossip(Algorithm[S]):
    """A method whose ranks mix their models with those of their neighbors.

    Attributes:
        compressor: of its messages; a method that can send them in one way only has none.

    """

    compressor: Compressor

    @abstractmethod
    def mix(self, local: Local, state: S, exchange: Exchange) -> None:
        """Mix `local.x` with the models of the neighbors; `local.g` is not looked at (collective on all ranks)."""

    def phases(self, local: Local, state: S, exchange: Exchange) -> Phases:
        """Take the local step, and mix."""
        yield None
        local.update()
        self.mix(local, state, exchange)

    def check_local_steps(self) -> None:
        """Raise ConfigError if `mix` cannot come after several local steps, or after steps that it has not seen."""
        if self.begins_before_gradient:
            raise ConfigError(
                f"algorithm.overlap = true: {self.name} would send behind one gradient, and local steps take several "
                "between two mixings. Leave it out."
            )


class RegroupingGossip(Gossip[S]):
    """A method whose ranks can go on when some of them have died: no rank is special, and none holds what is lost."""

    @abstractmethod
    def regroup_(self, local: Local, state: S, exchange: Exchange) -> None:
        """Go on with `exchange`, over a graph of fewer ranks, from any place in a step; collective on these ranks.

        The ranks may be steps apart. What was under way in the old exchange is lost.
        """


def lost_weight(topology: Topology, rank: int, arrived: Container[int]) -> float:
    """Return the sum of the weights ``W[rank, j]`` of the sources j of which no message has `arrived`.

    It goes to what the rank has itself, so that its weights still sum to one.
    """
    return sum((topology.weight(rank, j) for j in topology.sources(rank) if j not in arrived), start=0.0)


def divisors(local: Local, largest_lr: list[float]) -> list[float]:
    """Return the learning rate of each part of ``local.groups``, by which what has moved the model is divided.

    It is 0 where the rate is below `SMALLEST_RATE` of the largest so far: then a quotient would be too large for a rate
    that rises again, and what is made of it stays as it is. `largest_lr` holds the largest of each part.
    """
    groups = local.groups
    if len(largest_lr) != len(groups):  # the groups were arranged anew
        largest_lr[:] = [0.0] * len(groups)
    rates = [float(group["lr"]) for _, group in groups]
    largest_lr[:] = map(max, largest_lr, rates)
    return [lr if lr >= SMALLEST_RATE * largest else 0.0 for lr, largest in zip(rates, largest_lr, strict=True)]


def check_inner(inner: object) -> None:
    """Raise ConfigError unless `inner` is a gossip method that can mix after several local steps."""
    if not isinstance(inner, Gossip):
        raise ConfigError(
            f"algorithm.inner: {type(inner).__name__} has no mixing that could go without a gradient. Use a gossip "
            "method: 'dpsgd', 'choco', 'adagossip', 'deep_squeeze', 'def_atc' or 'power_gossip'."
        )
    inner.check_local_steps()
