"""Which tensors of a model are sent as a product of two narrow matrices, and where those lie in flat vectors.

A tensor of two or more dimensions is a matrix (m, n) of ``shape[0]`` rows and the rest as columns; it is approximated
by ``P Q'`` with P (m, r) and Q (n, r). The others, and matrices of which P and Q would not be shorter, are sent whole.
The P of all matrices lie one behind the other in one flat vector, `left`, and the Q in another, `right`: so they are
one message, however many tensors there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mpicomp.compression.message import Spec


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
    min_compression_rate: float = 1.0

    @property
    def left_numel(self) -> int:
        """The length of `left`: the entries of all P."""
        return sum(rows * r for rows, _, r in self._matrices)

    @property
    def right_numel(self) -> int:
        """The length of `right`: the entries of all Q."""
        return sum(columns * r for _, columns, r in self._matrices)

    @property
    def whole_numel(self) -> int:
        """The entries of all tensors that are sent whole."""
        return sum(self._whole)

    def matrices(self, x: Tensor) -> list[Tensor]:
        """Return the matrices (m, n) of the flat `x` (n,), views."""
        parts = zip(self._shapes, self.spec.split(x), strict=True)
        return [part.view(shape[:2]) for shape, part in parts if shape]

    def whole(self, x: Tensor) -> list[Tensor]:
        """Return the tensors of the flat `x` (n,) that are sent whole, as flat views."""
        return [part for shape, part in zip(self._shapes, self.spec.split(x), strict=True) if not shape]

    def lefts(self, left: Tensor) -> list[Tensor]:
        """Return the P (m, r) in `left`, views."""
        return _cut(left, [(rows, r) for rows, _, r in self._matrices])

    def rights(self, right: Tensor) -> list[Tensor]:
        """Return the Q (n, r) in `right`, views."""
        return _cut(right, [(columns, r) for _, columns, r in self._matrices])

    def sent_whole(self, sent: Tensor) -> list[Tensor]:
        """Return the parts of `sent` (whole_numel,), one for each tensor that is sent whole."""
        return list(torch.split(sent, self._whole)) if self._whole else []

    @cached_property
    def _matrices(self) -> list[tuple[int, int, int]]:
        return [shape for shape in self._shapes if shape]

    @cached_property
    def _whole(self) -> list[int]:
        return [part.numel for part, shape in zip(self.spec.parts, self._shapes, strict=True) if not shape]

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


def orthogonal(p: Tensor) -> Tensor:
    """Return a matrix (m, r) with orthonormal columns whose span contains that of `p` (m, r), for m >= r."""
    basis: Tensor = torch.linalg.qr(p if p.dtype == torch.float64 else p.float()).Q
    return basis


def _cut(factors: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    parts = torch.split(factors, [rows * r for rows, r in shapes]) if shapes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
