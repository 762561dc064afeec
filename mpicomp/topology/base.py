"""WHO talks to whom: a mixing matrix over ranks, and graphs that change from step to step.

`W` is the (size, size) mixing matrix of decentralized averaging, ``x_i <- sum_j W[i, j] x_j``: rank i listens to
rank j where ``W[i, j] != 0``. Rows sum to one; columns do too where the average is to be preserved. For push-sum it is
enough that columns do. CHOCO-SGD and AdaGossip further need ``W`` symmetric (Koloskova et al. 2019, arXiv 1902.00340,
Definition 1).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from mpicomp.errors import TopologyError
from mpicomp.topology.sparse import SparseMatrix

TOLERANCE = 1e-10
"""The allowed difference of a sum of weights from one."""


class Topology:
    """A fixed graph: ``topology(step)`` is the graph itself, so it is a `Schedule` as well. It cannot be changed.

    Memory and time of everything but `mixing` grow with the edges; a rank that asks for its own neighbors and weights
    takes time by their number. Equality is identity.

    Args:
        name: for messages and results, e.g. ``"ring"``.
        mixing: W, (size, size), dense or sparse, non-negative; row i holds the weights with which rank i averages.
        dims: extents of the Cartesian grid that this graph is, row-major over ranks; None for any other graph.
        periods: for each extent, whether that dimension wraps around.

    Raises:
        TopologyError: a matrix that is not square, not finite, negative, or of which neither all rows nor all columns
            sum to one; a grid of another size.

    """

    def __init__(
        self,
        name: str,
        mixing: ArrayLike | SparseMatrix,
        dims: tuple[int, ...] | None = None,
        periods: tuple[bool, ...] | None = None,
    ) -> None:
        self.name = name
        self.dims = dims
        self.periods = periods
        self._matrix = mixing if isinstance(mixing, SparseMatrix) else self._from_dense(mixing)
        self._check_weights()
        if dims is not None and (math.prod(dims) != self.size or len(dims) != len(periods or ())):
            raise TopologyError(f"topology {name!r}: dims {dims}, periods {periods} are no grid of {self.size} ranks")

    def _from_dense(self, mixing: ArrayLike) -> SparseMatrix:
        dense = np.asarray(mixing, dtype=np.float64)
        if dense.ndim != 2 or dense.shape[0] != dense.shape[1] or dense.shape[0] < 1:
            raise TopologyError(f"topology {self.name!r}: the mixing matrix must be square, not {dense.shape}")
        return SparseMatrix.from_dense(dense)

    def _check_weights(self) -> None:
        matrix = self._matrix
        if not np.isfinite(matrix.values).all() or (matrix.values < 0).any():
            raise TopologyError(f"topology {self.name!r}: weights must be finite and non-negative")
        sums = matrix.row_sums
        row = int(np.abs(sums - 1).argmax())
        if abs(sums[row] - 1) > TOLERANCE and not self.is_column_stochastic:
            raise TopologyError(f"topology {self.name!r}: row {row} sums to {sums[row]:.6g} instead of 1")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.size} ranks)"

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.matrix.size

    @property
    def matrix(self) -> SparseMatrix:
        """W, with the edges and the diagonal only."""
        return self._matrix

    @cached_property
    def mixing(self) -> np.ndarray:
        """W, dense, (size, size) float64: for small graphs."""
        dense = self.matrix.to_dense()
        dense.setflags(write=False)
        return dense

    def __call__(self, step: int) -> Topology:
        """Return this graph, for every step."""
        return self

    @property
    def union(self) -> Topology:
        """The graph with all edges of all steps: this graph itself."""
        return self

    def weight(self, rank: int, source: int) -> float:
        """Return the weight that `rank` gives to what `source` sends (``W[rank, source]``)."""
        matrix = self.matrix
        begin, end = int(matrix.indptr[rank]), int(matrix.indptr[rank + 1])
        place = bisect_left(matrix.indices, source, begin, end)
        return float(matrix.values[place]) if place < end and matrix.indices[place] == source else 0.0

    def sources(self, rank: int) -> list[int]:
        """Return the ranks that send to `rank`, ascending, without `rank`."""
        return _others(self.matrix, rank)

    def targets(self, rank: int) -> list[int]:
        """Return the ranks to which `rank` sends, ascending, without `rank`."""
        return _others(self.matrix.transposed, rank)

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether ``W == W.T``, which CHOCO-SGD and AdaGossip need."""
        matrix = self.matrix
        return bool((np.abs(matrix.difference(matrix.transposed).values) <= TOLERANCE).all())

    @cached_property
    def is_column_stochastic(self) -> bool:
        """Whether columns sum to one: no rank gives away more or less than it has, which push-sum needs."""
        return bool(np.abs(self.matrix.column_sums - 1).max() <= TOLERANCE)

    @cached_property
    def is_doubly_stochastic(self) -> bool:
        """Whether rows and columns sum to one, so that averaging preserves the mean over ranks."""
        return self.is_column_stochastic and bool(np.abs(self.matrix.row_sums - 1).max() <= TOLERANCE)

    @cached_property
    def is_connected(self) -> bool:
        """Whether there is a path from every rank to every other."""
        return bool(self.matrix.reached().all() and self.matrix.transposed.reached().all())

    @cached_property
    def edges_digest(self) -> str:
        """A SHA-256 of who hears whom: ranks that build the same graph have the same one."""
        matrix = self.matrix
        return hashlib.sha256(matrix.indptr.tobytes() + matrix.indices.tobytes()).hexdigest()

    @cached_property
    def weights_digest(self) -> str:
        """A SHA-256 of the dense matrix, rounded to 12 places: the same on every machine, and in every checkpoint."""
        digest = hashlib.sha256()
        for block in self._dense_blocks():
            digest.update(np.round(block, 12).tobytes())
        return digest.hexdigest()

    def _dense_blocks(self) -> Iterator[np.ndarray]:
        return self.matrix.dense_blocks()


def _others(matrix: SparseMatrix, rank: int) -> list[int]:
    """Return the columns of the entries of row `rank`, without the diagonal."""
    columns: list[int] = matrix.indices[matrix.indptr[rank] : matrix.indptr[rank + 1]].tolist()
    return [column for column in columns if column != rank]


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
