"""Graphs that change from step to step; all ranks compute the same graph without communication.

- one-peer exponential: at step t rank i sends to ``i + 2^(t mod tau) mod n`` and hears ``i - 2^(t mod tau)``,
  ``tau = ceil(log2 n)``, with weights 1/2. One message a step; directed. For ``n = 2^q`` the product of the matrices of
  a period is exactly the mean (Assran et al. 2019, arXiv 1811.10792; Ying et al. 2021, arXiv 2110.13363).
- random matching: at each step the ranks are paired at random and each pair averages, with weights 1/2. One message a
  step at most; symmetric (Boyd et al. 2006, doi 10.1109/TIT.2006.874516).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar

import numpy as np

from mpicomp.topology.arguments import require_integer, require_size
from mpicomp.topology.base import Topology
from mpicomp.topology.static import complete, exponential, hops


@dataclass(frozen=True)
class OnePeerExponential:
    """One target at ``2^(step mod period)`` ranks ahead, one source as far behind; weights 1/2.

    Attributes:
        size: the number of ranks.

    Raises:
        TopologyError: a size that is not a whole number of at least one.

    """

    name: ClassVar[str] = "one_peer_exponential"

    size: int

    def __post_init__(self) -> None:
        require_size(self.name, self.size)

    @property
    def period(self) -> int:
        """The number of steps after which the graphs repeat: ``ceil(log2 size)``, at least 1."""
        return len(self._graphs)

    @property
    def union(self) -> Topology:
        """The static exponential graph, which has the edges of all steps."""
        return exponential(self.size)

    def __call__(self, step: int) -> Topology:
        """Return the graph of `step`."""
        return self._graphs[step % self.period]

    @cached_property
    def _graphs(self) -> list[Topology]:
        # A single rank has no hop; a hop of 0 leaves it alone with weight one.
        identity = np.eye(self.size)
        return [Topology(self.name, (identity + np.roll(identity, hop, axis=0)) / 2) for hop in hops(self.size) or [0]]


@dataclass(frozen=True)
class RandomMatching:
    """Disjoint random pairs, drawn anew for each step from (seed, step); with an odd size one rank has no partner.

    Attributes:
        size: the number of ranks.
        seed: of the draws, a whole number of at least 0.

    Raises:
        TopologyError: a size below one, or a seed below zero.

    """

    name: ClassVar[str] = "random_matching"

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_size(self.name, self.size)
        require_integer("topology.seed", self.seed, 0)

    @property
    def union(self) -> Topology:
        """The complete graph, because every pair may occur."""
        return complete(self.size)

    @property
    def mean(self) -> Topology:
        """The expectation of the matrix of a step.

        The matrix of a matching is a projection, so the expected squared distance to consensus shrinks at each step
        by the second eigenvalue of this one: 1/2 for an odd size, ``1 - size / (2 (size - 1))`` for an even one.
        """
        if self.size == 1:
            return complete(1)
        # All size * (size - 1) / 2 pairs are equally likely and size // 2 of them occur at once.
        pair = (self.size // 2) / (self.size * (self.size - 1) / 2)
        mixing = np.full((self.size, self.size), pair / 2)
        np.fill_diagonal(mixing, 1 - (self.size - 1) * pair / 2)
        return Topology(self.name, mixing)

    def __call__(self, step: int) -> Topology:
        """Return the graph of `step`."""
        return _matching(self.size, self.seed, step)


# The ranks of one process ask for the same step, or one beside it: more graphs would only hold memory.
@lru_cache(maxsize=2)
def _matching(size: int, seed: int, step: int) -> Topology:
    # The raw stream of a counter-based generator does not change between versions of numpy, unlike `permutation`. The
    # step is the second word of the counter because the first one advances as numbers are drawn.
    draws = np.random.Philox(key=seed, counter=[0, step, 0, 0]).random_raw(size)
    order = np.argsort(draws, kind="stable")
    left, right = order[: size // 2], order[size // 2 : 2 * (size // 2)]
    mixing = np.eye(size)
    for rows, columns in ((left, left), (left, right), (right, left), (right, right)):
        mixing[rows, columns] = 0.5
    return Topology(RandomMatching.name, mixing)
