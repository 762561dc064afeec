"""Square matrices of which most entries are zero, in compressed sparse rows (CSR)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

BLOCK = 1 << 17
"""How many entries of a dense matrix are held at a time: 1 MiB."""


# Equality is identity: comparing the fields would ask an array for its truth.
@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A square matrix in compressed sparse rows; it cannot be changed.

    Attributes:
        indptr: (size + 1,) int64; row i has the entries ``indptr[i]`` to ``indptr[i + 1]``, without the latter.
        indices: (entries,) int32; the column of each entry, ascending in each row.
        values: (entries,) float64.

    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        for array in (self.indptr, self.indices, self.values):
            array.setflags(write=False)

    @classmethod
    def from_dense(cls, matrix: ArrayLike) -> SparseMatrix:
        """Return the entries of a (size, size) matrix that are not zero."""
        dense = np.asarray(matrix, dtype=np.float64)
        rows, columns = np.nonzero(dense)
        return cls(_bounds(rows, len(dense)), columns.astype(np.int32), dense[rows, columns])

    @classmethod
    def from_edges(cls, size: int, rows: ArrayLike, columns: ArrayLike) -> SparseMatrix:
        """Return the matrix with ones at these places, in any order; a place may be given twice."""
        keys = np.unique(np.asarray(rows, dtype=np.int64) * size + np.asarray(columns, dtype=np.int64))
        rows = keys // size
        return cls(_bounds(rows, size), (keys - rows * size).astype(np.int32), np.ones(len(keys)))

    @property
    def size(self) -> int:
        """The number of rows, and of columns."""
        return len(self.indptr) - 1

    @property
    def counts(self) -> np.ndarray:
        """The number of entries of each row, (size,)."""
        return np.diff(self.indptr)

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each entry, (entries,)."""
        return np.repeat(np.arange(self.size, dtype=np.int32), self.counts)

    @property
    def column_counts(self) -> np.ndarray:
        """The number of entries of each column, (size,)."""
        return np.bincount(self.indices, minlength=self.size)

    @property
    def column_sums(self) -> np.ndarray:
        """The sum of each column, (size,)."""
        return np.bincount(self.indices, weights=self.values, minlength=self.size)

    @property
    def row_sums(self) -> np.ndarray:
        """The sum of each row, (size,), added from left to right."""
        return np.bincount(self.rows, weights=self.values, minlength=self.size)

    @property
    def dense_row_sums(self) -> np.ndarray:
        """The sum of each row, (size,), to the last bit what numpy gives for the dense matrix.

        Takes time by the square of the ranks, and memory for a block of rows.
        """
        # The order in which numpy adds depends on where the zeros are, and a last bit of a weight is one of the model.
        return np.concatenate([block.sum(axis=1) for block in self.dense_blocks()])

    @cached_property
    def transposed(self) -> SparseMatrix:
        """The transposed matrix."""
        order = np.argsort(self.indices, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(self.column_counts)])
        return SparseMatrix(bounds, self.rows[order], self.values[order])

    def same_places(self, other: SparseMatrix) -> bool:
        """Return whether both have entries at the same places."""
        return np.array_equal(self.indptr, other.indptr) and np.array_equal(self.indices, other.indices)

    def difference(self, other: SparseMatrix) -> SparseMatrix:
        """Return this matrix minus another of the same size."""
        if self.same_places(other):
            return SparseMatrix(self.indptr, self.indices, self.values - other.values)
        places = [each.rows.astype(np.int64) * self.size + each.indices for each in (self, other)]
        keys, where = np.unique(np.concatenate(places), return_inverse=True)
        values = np.bincount(where, weights=np.concatenate([self.values, -other.values]))
        rows = keys // self.size
        return SparseMatrix(_bounds(rows, self.size), (keys - rows * self.size).astype(np.int32), values)

    def with_diagonal(self, diagonal: np.ndarray) -> SparseMatrix:
        """Return this matrix, which has no entries on the diagonal, with these (size,)."""
        before = np.bincount(self.rows[self.indices < self.rows], minlength=self.size)
        places = self.indptr[:-1] + before
        indices = np.insert(self.indices, places, np.arange(self.size, dtype=np.int32))
        return SparseMatrix(self.indptr + np.arange(self.size + 1), indices, np.insert(self.values, places, diagonal))

    def without_diagonal(self) -> SparseMatrix:
        """Return this matrix without the entries on the diagonal."""
        return self.only(self.rows != self.indices)

    def without_zeros(self) -> SparseMatrix:
        """Return this matrix without entries that are zero."""
        return self.only(self.values != 0)

    def only(self, kept: np.ndarray) -> SparseMatrix:
        """Return this matrix with only the entries that are `kept`, (entries,) bool."""
        return SparseMatrix(_bounds(self.rows[kept], self.size), self.indices[kept], self.values[kept])

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (size,)."""
        found = np.zeros(self.size)
        on_it = self.rows == self.indices
        found[self.indices[on_it]] = self.values[on_it]
        return found

    def times(self, x: np.ndarray) -> np.ndarray:
        """Return the product with a vector (size,)."""
        return np.bincount(self.rows, weights=self.values * x[self.indices], minlength=self.size)

    def dense_blocks(self) -> Iterator[np.ndarray]:
        """Yield the rows of the dense matrix, some at a time, (rows, size)."""
        step = max(1, BLOCK // self.size)
        for begin in range(0, self.size, step):
            end = min(begin + step, self.size)
            entries = slice(self.indptr[begin], self.indptr[end])
            block = np.zeros((end - begin, self.size))
            block[self.rows[entries] - begin, self.indices[entries]] = self.values[entries]
            yield block

    def to_dense(self) -> np.ndarray:
        """Return the dense matrix, (size, size)."""
        return np.concatenate(list(self.dense_blocks()))

    def reached(self) -> np.ndarray:
        """Return whether a walk along the entries, from row to column, comes from rank 0 to each rank, (size,) bool."""
        reached = np.zeros(self.size, dtype=bool)
        reached[0] = True
        frontier = np.zeros(1, dtype=np.int64)
        while len(frontier):
            counts = self.indptr[frontier + 1] - self.indptr[frontier]
            # The entries of all rows of the frontier, one after the other.
            offsets = np.repeat(self.indptr[frontier] - np.cumsum(counts) + counts, counts)
            heads = self.indices[offsets + np.arange(len(offsets))]
            fresh = heads[~reached[heads]]
            reached[fresh] = True
            frontier = np.unique(fresh)
        return reached


def _bounds(rows: np.ndarray, size: int) -> np.ndarray:
    """Return where each row begins among entries that are ordered by their `rows`, (size + 1,)."""
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=size))])
