"""Block top-k: the entries largest in magnitude in each small block of a tensor.

    blocks        = chunks of e x e entries of a matrix, e = floor(sqrt(block));  runs of `block` entries of a vector
    k_b           = max(1, floor(ratio n_b))                                of a block of n_b entries
    ``Q(x)_i      = x_i`` for the k_b entries of largest ``|x_i|`` of each block, else 0

Ties go to the lowest place in the block. A tensor of more dimensions is a matrix with its first one for rows;
dimensions of length 1 do not count; the last chunks and runs of a tensor may be smaller. Contractive with delta >=
min_b k_b / n_b, as top-k in each block: needs error feedback, or a method that has it built in. The selection needs
one pass over the vector and nothing from outside a block. Bytes: the values, 4 each or fewer by `values`, and a place
of ``ceil(log2(block))`` bits each, 12 for the default; every message has the same number of them. Top-k's coded
indices may be shorter, but their length varies. With ``values = "statistical"`` a value takes 2 bits (see
`mpicomp.compression.values`): the compressor of SparseLoCo (arXiv 2508.15706), ``ratio = 0.03125`` there. Chunks as of
DeMo (arXiv 2411.19870), which cuts by a divisor of the dimension.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import LONGEST, Field, Layout, Payload, Spec
from mpicomp.compression.ratio import check_ratio, kept
from mpicomp.compression.values import FixedValues, check_fixed_values, read_values, value_fields, write_values
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.kernels.reference import LARGEST_BLOCK, packed_nbytes
from mpicomp.state import State
from mpicomp.timing import timed, traced

Blocks = np.ndarray[tuple[int, int], np.dtype[np.int64]]
"""A table of blocks, a row each."""

_top_k_of_blocks = traced("select")(kernels.top_k_of_blocks)


@dataclass(frozen=True)
class _Plan:
    """The blocks of a model.

    Attributes:
        table: (blocks, 6) int64; see `mpicomp.kernels.reference.top_k_of_blocks`.
        counts: how many entries are kept of each tensor.
        total: of all.

    """

    table: Tensor
    counts: tuple[int, ...]
    total: int


@functools.lru_cache(maxsize=64)
def _plan(compressor: LargestOfBlocks, spec: Spec, device: torch.device) -> _Plan:
    if spec.numel > LONGEST:
        raise ValueError(f"a vector of {spec.numel} entries is too long for 32-bit indices: compress per tensor")
    rows, counts, begin = [np.empty((0, 5), np.int64)], [], 0
    for part in spec.parts:
        found = compressor.blocks_of(part.shapes[0])
        found[:, 0] += begin
        rows.append(found)
        counts.append(int(found[:, 4].sum()))
        begin += part.numel
    table = np.concatenate(rows)
    first = table[:, 4].cumsum() - table[:, 4]
    return _Plan(torch.from_numpy(np.column_stack([table, first])).to(device), tuple(counts), sum(counts))


class LargestOfBlocks(Compressor):
    """Keep the largest entries of each block; a subclass says what the blocks are."""

    @abstractmethod
    def blocks_of(self, shape: tuple[int, ...]) -> Blocks:
        """Return start, width, stride, size and count of the blocks of a tensor, (blocks, 5).

        See `mpicomp.kernels.reference.top_k_of_blocks`.
        """

    @property
    @abstractmethod
    def _longest(self) -> int:
        """The entries of a block at most, up to `LARGEST_BLOCK`."""

    @property
    def _sent_as(self) -> FixedValues:
        """How values travel."""
        return "full"

    @property
    def reads_any_strength(self) -> bool:
        """False: the ratio says which places are of which block."""
        return False

    @property
    def _bits(self) -> int:
        """The bits of a place in a block."""
        return max(1, (self._longest - 1).bit_length())

    def layout(self, spec: Spec) -> Layout:
        """Return ``scale`` or ``means`` if values have them, ``values``, and ``indices``: places, in bit planes."""
        plan = _plan(self, spec, torch.device("cpu"))
        parts = tuple(zip(spec.names, plan.counts, strict=True))
        values = value_fields(self._sent_as, spec.dtype, plan.total, parts=parts)
        return Layout((*values, Field("indices", torch.uint8, packed_nbytes(plan.total, self._bits))))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select the largest entries of each block; a DivergenceError names a tensor with a NaN."""
        payload, _ = self._select(x, None, spec)
        return payload

    @timed("compress")
    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Select without forming the difference; a DivergenceError names a tensor with a NaN."""
        payload, plan = self._select(x, x_hat, spec)
        self._add(payload, plan, x_hat, 1.0)
        return payload

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``; raise IndexError if a place is outside of its block."""
        self._add(payload, _plan(self, spec, out.device), out, weight)

    def _select(self, x: Tensor, y: Tensor | None, spec: Spec) -> tuple[Payload, _Plan]:
        plan = _plan(self, spec, x.device)
        try:
            values, places = _top_k_of_blocks(x, y, plan.table, plan.total)
        except DivergenceError as error:
            tensors = zip(spec.parts, spec.split(x if y is None else x - y), strict=True)
            name = next(part.names[0] for part, entries in tensors if entries.isnan().any())
            raise DivergenceError(f"{name}: {error}") from error
        payload = write_values(values, self._sent_as, plan.counts)
        payload["indices"] = kernels.pack_codes(places, self._bits)
        return payload, plan

    def _add(self, payload: Payload, plan: _Plan, out: Tensor, weight: float) -> None:
        indices = kernels.block_indices(payload["indices"], plan.table, self._bits, plan.total)
        kernels.scatter_add_(out, indices, read_values(payload, out.dtype, plan.counts), weight)


def _blocks(shape: tuple[int, ...], block: int) -> Blocks:
    """Return start, width, stride and size of the blocks of a tensor (blocks, 4)."""
    numel, sides = math.prod(shape), [side for side in shape if side != 1]
    if not numel:
        return np.empty((0, 4), np.int64)
    if len(sides) < 2:
        start = np.arange(0, numel, block)
        size = np.minimum(block, numel - start)
        return np.column_stack([start, size, np.zeros_like(start), size])
    height, width, edge = sides[0], numel // sides[0], math.isqrt(block)
    top, left = (axis.ravel() for axis in np.mgrid[0:height:edge, 0:width:edge])
    across, down = np.minimum(edge, width - left), np.minimum(edge, height - top)
    return np.column_stack([top * width + left, across, np.full_like(top, width), across * down])


@dataclass(frozen=True)
class BlockTopK(LargestOfBlocks):
    """Keep the largest entries of each block.

    Attributes:
        ratio: the fraction of the entries of a block that is kept, in (0, 1].
        block: entries of a block at most, 1 to 4096.
        values: how they travel, as in `TopK`, or ``"statistical"``: 2 bits and four means for each tensor.

    """

    ratio: float
    block: int = LARGEST_BLOCK
    values: FixedValues = "full"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 1 <= self.block <= LARGEST_BLOCK:
            raise ConfigError(f"compression.block = {self.block} must be in 1...{LARGEST_BLOCK}: entries of a block")
        check_fixed_values(self.values)

    def blocks_of(self, shape: tuple[int, ...]) -> Blocks:
        """Return chunks of a matrix, and runs of a vector."""
        found = _blocks(shape, self.block)
        sizes, kind_of = np.unique(found[:, 3], return_inverse=True)
        kept_of = np.array([kept(int(size), self.ratio) for size in sizes], np.int64)[kind_of.ravel()]
        return np.column_stack([found, kept_of])

    @property
    def _longest(self) -> int:
        return self.block

    @property
    def _sent_as(self) -> FixedValues:
        return self.values
