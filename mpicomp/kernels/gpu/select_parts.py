"""Selection by magnitude in each part of a vector, in as many launches for a hundred parts as for one.

    t[p] = the k[p]-th largest magnitude of part p          (by histograms of 8 bits each, the leading ones first)
    count the entries above t[p], and those equal to it, in every tile
    keep those above, and of those equal the first ones, after the sums of the counts of the tiles before

A tile belongs to one part, and a table says to which. See `select` for magnitudes, the order of ties, and `y`. The host
waits for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import BLOCK, jit, launch, tiles
from mpicomp.kernels.gpu.select import _bits, _entries, _magnitudes

_DIGIT = 8
"""Bits of a histogram."""


@dataclass(frozen=True)
class _Table:
    """Where the tiles lie, and what is wanted of the parts.

    Attributes:
        part: (tiles,) int32 the part that a tile belongs to.
        begin: (tiles,) int64 its first entry.
        end: (tiles,) int64 where its part ends.
        first: (parts,) int64 the first tile of a part.
        rank: (parts,) int64 how many entries are wanted of it.
        out: (parts,) int64 where they begin in the output.

    """

    part: Tensor
    begin: Tensor
    end: Tensor
    first: Tensor
    rank: Tensor
    out: Tensor


@functools.lru_cache(maxsize=64)
def _table(sizes: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> _Table:
    length = torch.tensor(sizes, dtype=torch.int64)
    rank = torch.tensor(counts, dtype=torch.int64)
    number = (length + BLOCK - 1) // BLOCK
    ends, first = length.cumsum(0), number.cumsum(0) - number
    part = torch.repeat_interleave(torch.arange(len(sizes)), number)
    begin = (ends - length)[part] + (torch.arange(len(part)) - first[part]) * BLOCK
    columns = part.int(), begin, ends[part], first, rank, rank.cumsum(0) - rank
    return _Table(*(column.to(device) for column in columns))


def top_k_of_parts(x: Tensor, y: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return values and indices of the largest entries of each part; see `reference.top_k_of_parts`."""
    table, parts = _table(tuple(sizes), tuple(counts), x.device), len(sizes)
    programs, kept, digits = len(table.part), sum(counts), tiles(_bits(x), _DIGIT)
    values, indices = x.new_empty(kept), torch.empty(kept, dtype=torch.int32, device=x.device)
    if not programs:
        return values, indices
    state = torch.zeros(parts, 2, dtype=torch.int64, device=x.device)
    histograms = torch.zeros(digits, parts, 2**_DIGIT, dtype=torch.int64, device=x.device)
    place = table.part, table.begin, table.end
    for digit, histogram in enumerate(histograms, start=1):
        shift = {"SHIFT": (digits - digit) * _DIGIT, "WIDTH": _DIGIT}
        launch(_histogram, programs, x, y, *place, state, histogram, **shift, BLOCK=BLOCK)
        launch(_pick, parts, state, histogram, table.rank, **shift)
    tallies = torch.empty(2, programs, dtype=torch.int32, device=x.device)
    launch(_count, programs, x, y, *place, state, tallies, BLOCK=BLOCK)
    ends = tallies.cumsum(1)
    wanted = table.first, table.rank, table.out
    launch(_emit, programs, x, y, *place, *wanted, state, ends, values, indices, BLOCK=BLOCK)
    return values, indices


@jit
def _histogram(
    x: tensor,
    y: tensor,
    part: tensor,
    begin: tensor,
    end: tensor,
    state: tensor,
    counts: tensor,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count the bits from SHIFT on of the entries of a tile, if the bits before are those of the state of its part."""
    tile = tl.program_id(0)
    p = tl.load(part + tile)
    i = tl.load(begin + tile) + tl.arange(0, BLOCK)
    inside = i < tl.load(end + tile)
    bits = _magnitudes(_entries(x, y, i, inside))
    low = tl.load(state + 2 * p).to(bits.dtype)
    fits = inside & ((bits >> SHIFT >> WIDTH) == (low >> SHIFT >> WIDTH))
    digit = (bits >> SHIFT) & ((1 << WIDTH) - 1)
    total = tl.histogram(digit.to(tl.int32), 1 << WIDTH, mask=fits)
    bins = (p << WIDTH) + tl.arange(0, 1 << WIDTH)
    tl.atomic_add(counts + bins, total.to(tl.int64), mask=total > 0, sem="relaxed")


@jit
def _pick(state: tensor, counts: tensor, rank: tensor, SHIFT: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Find the bin of the last wanted entry of a part, and bring its state up to date.

    That is the magnitude as far as it is known, and how many entries are in bins above its own.
    """
    p = tl.program_id(0)
    bins = tl.arange(0, 1 << WIDTH)
    count = tl.load(counts + (p << WIDTH) + bins)
    passed = tl.load(state + 2 * p + 1)
    reach = passed + tl.cumsum(count, reverse=True)
    digit = tl.sum((reach >= tl.load(rank + p)).to(tl.int64)) - 1
    tl.store(state + 2 * p, tl.load(state + 2 * p) | digit << SHIFT)
    tl.store(state + 2 * p + 1, passed + tl.sum(tl.where(bins > digit, count, 0)))


@jit
def _count(
    x: tensor, y: tensor, part: tensor, begin: tensor, end: tensor, state: tensor, tallies: tensor, BLOCK: tl.constexpr
) -> None:
    """Count the entries of a tile above the magnitude in the state of its part, and those equal to it."""
    tile = tl.program_id(0)
    i = tl.load(begin + tile) + tl.arange(0, BLOCK)
    inside = i < tl.load(end + tile)
    bits = _magnitudes(_entries(x, y, i, inside))
    low = tl.load(state + 2 * tl.load(part + tile)).to(bits.dtype)
    tl.store(tallies + tile, tl.sum((inside & (bits > low)).to(tl.int32)))
    tl.store(tallies + tl.num_programs(0) + tile, tl.sum((inside & (bits == low)).to(tl.int32)))


@jit
def _emit(
    x: tensor,
    y: tensor,
    part: tensor,
    begin: tensor,
    end: tensor,
    first: tensor,
    rank: tensor,
    out: tensor,
    state: tensor,
    ends: tensor,
    values: tensor,
    indices: tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the entries above, and the first equal ones, up to the number wanted of the part."""
    tile = tl.program_id(0)
    p = tl.load(part + tile)
    i = tl.load(begin + tile) + tl.arange(0, BLOCK)
    wanted = tl.load(rank + p)
    inside = (i < tl.load(end + tile)) & (wanted > 0)  # if nothing is, the state is not a magnitude
    entries = _entries(x, y, i, inside)
    bits = _magnitudes(entries)
    low = tl.load(state + 2 * p).to(bits.dtype)
    room = wanted - tl.load(state + 2 * p + 1)
    head = tl.load(first + p)
    equal_ends = ends + tl.num_programs(0)
    larger_before = tl.load(ends + tile - 1, mask=tile > 0, other=0) - tl.load(ends + head - 1, mask=head > 0, other=0)
    equal_before = tl.load(equal_ends + tile - 1, mask=tile > 0, other=0)
    equal_before -= tl.load(equal_ends + head - 1, mask=head > 0, other=0)
    ties = inside & (bits == low)
    kept = (inside & (bits > low)) | (ties & (equal_before + tl.cumsum(ties.to(tl.int32)) <= room))
    start = tl.load(out + p) + larger_before + tl.minimum(equal_before, room)
    place = start + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(values + place, entries, mask=kept)
    tl.store(indices + place, i.to(tl.int32), mask=kept)
