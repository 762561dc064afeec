"""WHO talks to whom: a mixing matrix over ranks, and graphs that change from step to step.

`W` is the (size, size) mixing matrix of decentralized averaging, ``x_i <- sum_j W[i, j] x_j``: rank i listens to
rank j where ``W[i, j] != 0``. Rows sum to one; columns do too where the average is to be preserved. CHOCO-SGD and
AdaGossip further need ``W`` symmetric (Koloskova et al. 2019, arXiv 1902.00340, Definition 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from mpicomp.errors import TopologyError

TOLERANCE = 1e-10
"""The allowed difference of a sum of weights from one."""


# Equality is identity: comparing the fields would ask an array for its truth.
@dataclass(frozen=True, eq=False)
class Topology:
    """A fixed graph: ``topology(step)`` is the graph itself, so it is a `Schedule` as well.

    Attributes:
        name: for messages and results, e.g. ``"ring"``.
        mixing: (size, size) float64, non-negative; row i holds the weights with which rank i averages.
        dims: extents of the Cartesian grid that this graph is, row-major over ranks; None for any other graph.
        periods: for each extent, whether that dimension wraps around.

    Raises:
        TopologyError: a matrix that is not square, not finite, negative, or whose rows do not sum to one; a grid of
            another size.

    """

    name: str
    mixing: np.ndarray = field(repr=False)
    dims: tuple[int, ...] | None = None
    periods: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        mixing = np.array(self.mixing, dtype=np.float64)
        if mixing.ndim != 2 or mixing.shape[0] != mixing.shape[1] or mixing.shape[0] < 1:
            raise TopologyError(f"topology {self.name!r}: the mixing matrix must be square, not {mixing.shape}")
        if not np.isfinite(mixing).all() or (mixing < 0).any():
            raise TopologyError(f"topology {self.name!r}: weights must be finite and non-negative")
        off = np.abs(mixing.sum(axis=1) - 1)
        if off.max() > TOLERANCE:
            row = int(off.argmax())
            raise TopologyError(f"topology {self.name!r}: row {row} sums to {mixing[row].sum():.6g} instead of 1")
        if self.dims is not None and (math.prod(self.dims) != len(mixing) or len(self.dims) != len(self.periods or ())):
            raise TopologyError(
                f"topology {self.name!r}: dims {self.dims}, periods {self.periods} are no grid of {len(mixing)} ranks"
            )
        mixing.setflags(write=False)
        object.__setattr__(self, "mixing", mixing)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return int(self.mixing.shape[0])

    def __call__(self, step: int) -> Topology:
        """Return this graph, for every step."""
        return self

    @property
    def union(self) -> Topology:
        """The graph with all edges of all steps: this graph itself."""
        return self

    def weight(self, rank: int, source: int) -> float:
        """Return the weight that `rank` gives to what `source` sends (``W[rank, source]``)."""
        return float(self.mixing[rank, source])

    def sources(self, rank: int) -> list[int]:
        """Return the ranks that send to `rank`, ascending, without `rank`."""
        return self._sources[rank]

    def targets(self, rank: int) -> list[int]:
        """Return the ranks to which `rank` sends, ascending, without `rank`."""
        return self._targets[rank]

    @cached_property
    def _sources(self) -> list[list[int]]:
        return [[int(j) for j in np.flatnonzero(row) if j != i] for i, row in enumerate(self.mixing)]

    @cached_property
    def _targets(self) -> list[list[int]]:
        return [[int(i) for i in np.flatnonzero(col) if i != j] for j, col in enumerate(self.mixing.T)]

    @property
    def is_symmetric(self) -> bool:
        """Whether ``W == W.T``, which CHOCO-SGD and AdaGossip need."""
        return bool(np.allclose(self.mixing, self.mixing.T, rtol=0, atol=TOLERANCE))

    @property
    def is_doubly_stochastic(self) -> bool:
        """Whether columns sum to one too, so that averaging preserves the mean over ranks."""
        return bool(np.abs(self.mixing.sum(axis=0) - 1).max() <= TOLERANCE)


@runtime_checkable
class Schedule(Protocol):
    """A graph for every step; all ranks compute the same graph."""

    @property
    def name(self) -> str:
        """The name of the schedule, e.g. ``"one_peer_exponential"``."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def union(self) -> Topology:
        """A graph with all edges that may occur at some step; its weights have no meaning."""

    def __call__(self, step: int) -> Topology:
        """Return the graph of `step` (counted from 0)."""
