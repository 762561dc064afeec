"""Selection by magnitude in each small block of a vector, in one launch.

    t = the k-th largest magnitude of a block, bit after bit: a bit is set if k entries reach t with it
    keep the entries above t, and of those equal to t the first ones

A program has a block, whose entries stay in its registers. See `select` for magnitudes and for `y`, and
`reference.top_k_of_blocks` for the table of blocks. The host waits for nothing.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import BLOCK, jit, launch, offsets, tiles
from mpicomp.kernels.gpu.pack import matrix, store_codes
from mpicomp.kernels.gpu.select import _bits, _entries, _magnitudes
from mpicomp.kernels.reference import LARGEST_BLOCK, packed_nbytes

_GROUPS = BLOCK // 8
_PLACES = 256
"""Places that a program reads at a time."""


def top_k_of_blocks(x: Tensor, y: Tensor | None, table: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return values and places of the largest entries of each block; see `reference.top_k_of_blocks`."""
    values, places = x.new_empty(total), torch.empty(total, dtype=torch.int16, device=x.device)
    launch(_select, len(table), x, y, table, values, places, BITS=_bits(x), BLOCK=LARGEST_BLOCK)
    return values, places


def block_indices(packed: Tensor, table: Tensor, bits: int, total: int) -> Tensor:
    """Return the indices of packed places; one outside of its block becomes -1, as an error would have to wait."""
    indices = torch.empty(total, dtype=torch.int32, device=packed.device)
    launch(_indices, len(table), packed, table, indices, packed_nbytes(total, 1), BITS=bits, BLOCK=_PLACES)
    return indices


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return int16 `codes` in bit planes; see `reference.pack_codes`."""
    n, groups = len(codes), packed_nbytes(len(codes), 1)
    packed = torch.empty(bits * groups, dtype=torch.uint8, device=codes.device)
    launch(_pack, tiles(n), codes, packed, n, groups, BITS=bits, GROUPS=_GROUPS)
    return packed


@jit
def _select(
    x: tensor,
    y: tensor,
    table: tensor,
    values: tensor,
    places: tensor,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the largest entries of a block."""
    block = tl.program_id(0)
    row = table + tl.cast(block, tl.int64) * 6
    start = tl.load(row)
    width = tl.load(row + 1).to(tl.int32)
    stride = tl.load(row + 2)
    size = tl.load(row + 3).to(tl.int32)
    wanted = tl.load(row + 4).to(tl.int32)
    place = tl.arange(0, BLOCK)
    inside = place < size
    entries = _entries(x, y, start + (place // width) * stride + place % width, inside)
    bits = _magnitudes(entries)
    t = tl.zeros((1,), bits.dtype)
    one = tl.full((1,), 1, bits.dtype)
    for i in range(BITS):
        tried = t | (one << (BITS - 1 - i))
        reach = tl.sum((inside & (bits >= tried)).to(tl.int32))
        t = tl.where(reach >= wanted, tried, t)
    larger = inside & (bits > t)
    ties = inside & (bits == t)
    room = wanted - tl.sum(larger.to(tl.int32))
    kept = larger | (ties & (tl.cumsum(ties.to(tl.int32)) <= room))
    at = tl.load(row + 5) + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(values + at, entries, mask=kept)
    tl.store(places + at, place.to(tl.int16), mask=kept)


@jit
def _indices(
    packed: tensor, table: tensor, indices: tensor, groups: tensor, BITS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write the indices of the places of a block."""
    row = table + tl.cast(tl.program_id(0), tl.int64) * 6
    start = tl.load(row)
    width = tl.load(row + 1).to(tl.int32)
    stride = tl.load(row + 2)
    size = tl.load(row + 3).to(tl.int32)
    count = tl.load(row + 4).to(tl.int32)
    first = tl.load(row + 5)
    for tile in range(tl.cdiv(count, BLOCK)):
        i = tile * BLOCK + tl.arange(0, BLOCK)
        inside = i < count
        at = first + i
        place = tl.zeros((BLOCK,), tl.int32)
        for plane in tl.static_range(BITS):
            byte = tl.load(packed + (at // 8 + tl.cast(groups, tl.int64) * plane), mask=inside, other=0)
            place |= ((byte.to(tl.int32) >> (at % 8).to(tl.int32)) & 1) << plane
        index = start + (place // width) * stride + place % width
        tl.store(indices + at, tl.where(place < size, index, -1).to(tl.int32), mask=inside)


@jit
def _pack(codes: tensor, packed: tensor, n: tensor, groups: tensor, BITS: tl.constexpr, GROUPS: tl.constexpr) -> None:
    """Write codes in bit planes."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    store_codes(packed, tl.load(codes + i, mask=i < n, other=0).to(tl.int32), group, groups, BITS)
