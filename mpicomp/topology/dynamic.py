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
from mpicomp.topology.implicit import Complete, Matching
from mpicomp.topology.sparse import SparseMatrix
from mpicomp.topology.static import complete, exponential, hops
from mpicomp.topology.weights import uniform


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
        return len(hops(self.size)) or 1

    @cached_property
    def union(self) -> Topology:
        """The static exponential graph, which has the edges of all steps."""
        return exponential(self.size)

    def __call__(self, step: int) -> Topology:
        """Return the graph of `step`."""
        return _shifted(self.size, step % self.period)


@lru_cache(maxsize=64)
def _shifted(size: int, number: int) -> Topology:
    """Return the graph of the step `number` of a period; the ranks of one process share it."""
    # A single rank has no hop, and the loop that is left has weight one.
    hop = (hops(size) or [0])[number]
    ranks = np.arange(size)
    return Topology(
        OnePeerExponential.name, uniform(SparseMatrix.from_edges(size, ranks, (ranks - hop) % size).without_diagonal())
    )


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

    @cached_property
    def union(self) -> Topology:
        """The complete graph, because every pair may occur."""
        return complete(self.size)

    @cached_property
    def mean(self) -> Topology:
        """The expectation of the matrix of a step.

        The matrix of a matching is a projection, so the expected squared distance to consensus shrinks at each step
        by the second eigenvalue of this one: 1/2 for an odd size, ``1 - size / (2 (size - 1))`` for an even one.
        """
        if self.size == 1:
            return complete(1)
        # All size * (size - 1) / 2 pairs are equally likely and size // 2 of them occur at once.
        pair = (self.size // 2) / (self.size * (self.size - 1) / 2)
        return Complete(self.name, pair / 2, np.full(self.size, 1 - (self.size - 1) * pair / 2))

    def __call__(self, step: int) -> Topology:
        """Return the graph of `step`."""
        return _matching(self.size, self.seed, step)


# The ranks of one process ask for the same step, or one beside it: more graphs would only hold memory.
@lru_cache(maxsize=2)
def _matching(size: int, seed: int, step: int) -> Matching:
    return Matching(RandomMatching.name, size, f"{seed} {step}".encode())
