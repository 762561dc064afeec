"""Count sketch: a vector as a small table, linear in the vector, from which its large entries can be read.

    S(x)[r, c] = sum of s_r(i) x_i over the entries i with b_r(i) = c
    U(S)_i     = median over r of s_r(i) S[r, b_r(i)]

x is (n,), S (rows, columns); s_r(i) is a random sign and b_r(i) the bucket of entry i in row r. S is linear, so the
mean of the sketches of all ranks is the sketch of the mean. Each row's estimate is unbiased, with a variance of about
``|x|^2 / columns``; the median over an odd number of rows has fewer outliers.

Buckets are those of a random permutation, ``b_r(i) = p_r(i) mod columns``, and not of a hash function: so all have
``n / columns`` entries, to one, and with ``columns = n`` U(S(x)) is x itself. Permutations and signs depend on the seed
and the row alone. An entry is put in its place p_r(i) before neighbors are added up, so no two are added to the same
number at once: on every device the order of the sum, and all bits, are the same. Charikar, Chen, Farach-Colton 2002,
doi 10.1007/3-540-45465-9_59.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import blocks
from mpicomp.compression.random import mix64
from mpicomp.kernels.reference import number
from mpicomp.timing import timed


class CountSketch:
    """The linear map S, and its reading U.

    Memory: ``rows`` vectors (n,) of 4 bytes an entry, the places with the signs.

    Args:
        like: (n,), a vector of the length and device of those that are sketched; n < 2**31.
        rows: of the table, odd.
        columns: of the table; at most n are used.
        seed: of permutations and signs.

    """

    def __init__(self, like: Tensor, rows: int, columns: int, seed: int) -> None:
        n = len(like)
        if n >= 2**31:
            raise ValueError(f"a vector of {n} entries is too long for a sketch with places of 32 bits")
        self._columns = max(1, min(columns, n))
        # from 1 on, so that they have a sign
        self._places = torch.empty(rows, n, dtype=torch.int32, device=like.device)
        for row, places in enumerate(self._places):
            key = number(mix64(seed, row, 0) >> 1, torch.int64, like.device)
            places.copy_(kernels.random_indices(key, n, n)).add_(1)
            upper = kernels.noise(places, mix64(seed, row, 1)) >= 0.5
            places.mul_(upper.int().mul_(2).sub_(1))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a table."""
        return len(self._places), self._columns

    @timed("compress")
    def of(self, x: Tensor) -> Tensor:
        """Return S(x) (rows, columns)."""
        rows, columns = self.shape
        table = x.new_empty(rows, columns)
        for row, places in zip(table, self._places, strict=True):
            height = max(1, -(-len(x) // columns))
            spread = x.new_zeros(height, columns)
            kernels.scatter_add_(spread.view(-1), places.abs() - 1, x * places.sign())
            while height > 1:
                half = -(-height // 2)
                spread[: height - half].add_(spread[half:height])
                height = half
            row.copy_(spread[0])
        return table

    @timed("compress")
    def read(self, table: Tensor, out: Tensor) -> Tensor:
        """Overwrite `out` (n,) with U(`table`), and return it."""
        rows, columns = self.shape
        for start, stop in blocks(len(out)):
            places = self._places[:, start:stop]
            found = table.gather(1, (places.abs() - 1).remainder(columns).long()).mul_(places.sign())
            out[start:stop] = found.sort(dim=0).values[rows // 2]
        return out
