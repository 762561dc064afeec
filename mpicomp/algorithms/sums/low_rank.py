"""Which tensors of a model are sent as a product of two narrow matrices, and where those lie in flat vectors.

A tensor of two or more dimensions is a matrix (m, n) of ``shape[0]`` rows and the rest as columns; it is approximated
by ``P Q'`` with P (m, r) and Q (n, r). The others, and matrices of which P and Q would not be shorter, are sent whole.
The P of all matrices lie one behind the other in one flat vector, `left`, and the Q in another, `right`, where what is
sent whole follows them: so each step is two sums of one vector, however many tensors there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mpicomp.compression.message import Spec


class Matrix(NamedTuple):
    """Views of a tensor's gradient with its error (m, n), of its mean gradient (m, n), and of P (m, r) and Q (n, r)."""

    m: Tensor
    g: Tensor
    p: Tensor
    q: Tensor


class Whole(NamedTuple):
    """Views of a tensor's gradient with its error, of its mean gradient, and of what is sent of it, all (numel,)."""

    m: Tensor
    g: Tensor
    sent: Tensor


@dataclass(frozen=True)
class LowRank:
    """The tensors of `spec`, divided into matrices and those that are sent whole.

    Attributes:
        spec: of the flat vector.
        rank: r, at least 1; less for a matrix that has fewer rows or columns.
        min_compression_rate: a matrix is sent whole unless its P and Q have at most one in so many of its entries.

    """

    spec: Spec
    rank: int
    min_compression_rate: float

    @property
    def left_numel(self) -> int:
        """The length of `left`: the entries of all P."""
        return sum(self._left_numels)

    @property
    def right_numel(self) -> int:
        """The length of `right`: the entries of all Q, and of what is sent whole."""
        return sum(self._right_numels)

    def views(self, m: Tensor, g: Tensor, left: Tensor, right: Tensor) -> tuple[list[Matrix], list[Whole]]:
        """Return the tensors of the flat `m` and `g` (n,) with their places in `left` and `right`."""
        lefts, rights = iter(torch.split(left, self._left_numels)), iter(torch.split(right, self._right_numels))
        tensors = list(zip(self._shapes, self.spec.split(m), self.spec.split(g), strict=True))
        matrices, whole = [], []
        for shape, m, g in tensors:
            if shape:
                rows, columns, r = shape
                p, q = next(lefts).view(rows, r), next(rights).view(columns, r)
                matrices.append(Matrix(m.view(rows, columns), g.view(rows, columns), p, q))
        for shape, m, g in tensors:
            if not shape:
                whole.append(Whole(m, g, next(rights)))
        return matrices, whole

    @property
    def _left_numels(self) -> list[int]:
        return [rows * r for rows, _, r in filter(None, self._shapes)]

    @property
    def _right_numels(self) -> list[int]:
        factors = [columns * r for _, columns, r in filter(None, self._shapes)]
        return factors + [part.numel for part, shape in zip(self.spec.parts, self._shapes, strict=True) if not shape]

    @cached_property
    def _shapes(self) -> list[tuple[int, int, int] | None]:
        """Rows, columns and rank of each tensor; None if it is sent whole."""
        return [self._shape(part.shapes[0]) for part in self.spec.parts]

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(self.rank, rows, columns)
        is_narrow = rank * (rows + columns) * self.min_compression_rate <= rows * columns
        return (rows, columns, rank) if rank and is_narrow else None
