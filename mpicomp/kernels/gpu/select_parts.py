"""Selection by magnitude in each part of a vector, in as many launches for a hundred parts as for one.

    t[p] = the k[p]-th largest magnitude of part p          (by histograms of 8 bits each, the leading ones first)
    count the entries above t[p], and those equal to it, in every tile
    keep those above, and of those equal the first ones, after the sums of the counts of the tiles before

A tile belongs to one part, and a table says to which. What a histogram says of t[p] is found by every program of the
next kernel, for its own part, rather than by a launch between the two. See `select` for magnitudes, the order of ties,
and `y`. The host waits for nothing.

Where all parts are short, as the tensors of a ResNet-20 are, one launch does all of it: a program has a part, and goes
over its tiles once for each digit and once more to write.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import BLOCK, jit, launch, offsets, tiles
from mpicomp.kernels.gpu.select import _bits, _entries, _magnitudes

_DIGIT = 8
"""Bits of a histogram."""

_SHORT = 2**16
"""Entries of a part up to which one program selects from all of it; chosen, not measured on a GPU."""


@dataclass(frozen=True)
class _Table:
    """Where the tiles lie, and what is wanted of the parts.

    Attributes:
        part: (tiles,) int32 the part that a tile belongs to.
        begin: (tiles,) int64 its first entry.
        end: (tiles,) int64 where its part ends.
        start: (parts,) int64 the first entry of a part.
        size: (parts,) int64 how many it has.
        first: (parts,) int64 its first tile.
        rank: (parts,) int64 how many entries are wanted of it.
        out: (parts,) int64 where they begin in the output.

    """

    part: Tensor
    begin: Tensor
    end: Tensor
    start: Tensor
    size: Tensor
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
    columns = part.int(), begin, ends[part], ends - length, length, first, rank, rank.cumsum(0) - rank
    return _Table(*(column.to(device) for column in columns))


def top_k_of_parts(x: Tensor, y: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return values and indices of the largest entries of each part; see `reference.top_k_of_parts`."""
    table, parts = _table(tuple(sizes), tuple(counts), x.device), len(sizes)
    programs, kept, digits = len(table.part), sum(counts), tiles(_bits(x), _DIGIT)
    values, indices = x.new_empty(kept), torch.empty(kept, dtype=torch.int32, device=x.device)
    if not programs:
        return values, indices
    search = {"WIDTH": _DIGIT, "BLOCK": BLOCK}
    if max(sizes) <= _SHORT:
        columns = table.start, table.size, table.rank, table.out
        launch(_select_part, parts, x, y, *columns, values, indices, DIGITS=digits, **search)
        return values, indices
    room = torch.zeros(parts * (2 * (digits + 1) + digits * 2**_DIGIT), dtype=torch.int64, device=x.device)
    states = room[: 2 * (digits + 1) * parts].view(digits + 1, parts, 2)
    histograms = room[states.numel() :].view(digits, parts, 2**_DIGIT)
    tallies = torch.empty(2, programs, dtype=torch.int32, device=x.device)
    vectors = x, y, table.part, table.begin, table.end, table.first, table.rank
    for digit in range(digits):
        shift = (digits - 1 - digit) * _DIGIT
        launch(_histogram, programs, *vectors, states, histograms, parts, DIGIT=digit, SHIFT=shift, **search)
    launch(_count, programs, *vectors, states, histograms, parts, tallies, DIGITS=digits, **search)
    ends = tallies.cumsum(1)
    launch(_emit, programs, *vectors, table.out, states[digits], ends, values, indices, BLOCK=BLOCK)
    return values, indices


@jit
def _pick(count: tensor, passed: tensor, wanted: tensor, WIDTH: tl.constexpr) -> tuple[tensor, tensor]:
    """Return the bin of the last wanted entry, and how many entries are in bins above; `passed` are above them all."""
    bins = tl.arange(0, 1 << WIDTH)
    reach = passed + tl.cumsum(count, reverse=True)  # entries in this bin or above it: falls with the bin
    digit = tl.sum((reach >= wanted).to(tl.int64)) - 1
    return digit, passed + tl.sum(tl.where(bins > digit, count, 0))


@jit
def _select_part(
    x: tensor,
    y: tensor,
    start: tensor,
    size: tensor,
    rank: tensor,
    out: tensor,
    values: tensor,
    indices: tensor,
    DIGITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the entries of a part above its last wanted magnitude, and the first equal ones."""
    p = tl.program_id(0)
    begin = tl.load(start + p)
    n = tl.load(size + p)
    wanted = tl.load(rank + p)
    low = tl.cast(0, tl.int64)
    passed = tl.cast(0, tl.int64)
    for digit in tl.static_range(DIGITS):
        shift = (DIGITS - 1 - digit) * WIDTH
        count = tl.zeros((1 << WIDTH,), tl.int64)
        for tile in range(tl.cdiv(n, BLOCK)):
            i = offsets(tile, BLOCK)
            inside = i < n
            bits = _magnitudes(_entries(x, y, begin + i, inside))
            fits = inside & ((bits >> shift >> WIDTH) == (low.to(bits.dtype) >> shift >> WIDTH))
            digits = (bits >> shift) & ((1 << WIDTH) - 1)
            count += tl.histogram(digits.to(tl.int32), 1 << WIDTH, mask=fits).to(tl.int64)
        found, passed = _pick(count, passed, wanted, WIDTH)
        low |= found << shift
    place = tl.load(out + p) - 1
    room = wanted - passed
    equal = tl.cast(0, tl.int64)
    for tile in range(tl.cdiv(n, BLOCK)):
        i = offsets(tile, BLOCK)
        inside = (i < n) & (wanted > 0)  # if nothing is, low is not a magnitude
        entries = _entries(x, y, begin + i, inside)
        bits = _magnitudes(entries)
        ties = inside & (bits == low.to(bits.dtype))
        kept = (inside & (bits > low.to(bits.dtype))) | (ties & (equal + tl.cumsum(ties.to(tl.int32)) <= room))
        at = place + tl.cumsum(kept.to(tl.int32))
        tl.store(values + at, entries, mask=kept)
        tl.store(indices + at, (begin + i).to(tl.int32), mask=kept)
        place += tl.sum(kept.to(tl.int32))
        equal += tl.sum(ties.to(tl.int32))


@jit
def _known(
    states: tensor,
    histograms: tensor,
    rank: tensor,
    parts: tensor,
    p: tensor,
    is_first: tensor,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tensor:
    """Return the magnitude of the last wanted entry of part `p` by its digits before DIGIT, the others being zeros.

    The first tile of a part writes that down for the next kernel, and how many entries are in bins above. SHIFT is the
    lowest bit of the last digit known.
    """
    low = tl.cast(0, tl.int64)
    if DIGIT > 0:
        row = tl.cast(p, tl.int64) + (DIGIT - 1) * parts
        count = tl.load(histograms + (row << WIDTH) + tl.arange(0, 1 << WIDTH))
        digit, passed = _pick(count, tl.load(states + 2 * row + 1), tl.load(rank + p), WIDTH)
        low = tl.load(states + 2 * row) | digit << SHIFT
        found = states + 2 * (row + parts)
        tl.store(found, low, mask=is_first)
        tl.store(found + 1, passed, mask=is_first)
    return low


@jit
def _histogram(
    x: tensor,
    y: tensor,
    part: tensor,
    begin: tensor,
    end: tensor,
    first: tensor,
    rank: tensor,
    states: tensor,
    histograms: tensor,
    parts: tensor,
    DIGIT: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count the bits from SHIFT on of the entries of a tile, if the bits before are those known of its part."""
    tile = tl.program_id(0)
    p = tl.load(part + tile)
    i = tl.load(begin + tile) + tl.arange(0, BLOCK)
    inside = i < tl.load(end + tile)
    bits = _magnitudes(_entries(x, y, i, inside))
    is_first = tile == tl.load(first + p)
    low = _known(states, histograms, rank, parts, p, is_first, DIGIT, SHIFT + WIDTH, WIDTH).to(bits.dtype)
    fits = inside & ((bits >> SHIFT >> WIDTH) == (low >> SHIFT >> WIDTH))
    digit = (bits >> SHIFT) & ((1 << WIDTH) - 1)
    total = tl.histogram(digit.to(tl.int32), 1 << WIDTH, mask=fits)
    counts = histograms + ((tl.cast(p, tl.int64) + DIGIT * parts) << WIDTH)
    tl.atomic_add(counts + tl.arange(0, 1 << WIDTH), total.to(tl.int64), mask=total > 0, sem="relaxed")


@jit
def _count(
    x: tensor,
    y: tensor,
    part: tensor,
    begin: tensor,
    end: tensor,
    first: tensor,
    rank: tensor,
    states: tensor,
    histograms: tensor,
    parts: tensor,
    tallies: tensor,
    DIGITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count the entries of a tile above the last wanted magnitude of its part, and those equal to it."""
    tile = tl.program_id(0)
    p = tl.load(part + tile)
    i = tl.load(begin + tile) + tl.arange(0, BLOCK)
    inside = i < tl.load(end + tile)
    bits = _magnitudes(_entries(x, y, i, inside))
    is_first = tile == tl.load(first + p)
    low = _known(states, histograms, rank, parts, p, is_first, DIGITS, 0, WIDTH).to(bits.dtype)
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
