"""Selection by magnitude, in two passes over the vector when a sample guesses well.

    low = a bound that, by a sample, a few more than k magnitudes reach
    count the entries that reach it, in every tile          (a pass over the vector; their number goes to the host)
    candidates = these entries, after the sum of the counts before their tile             (another)
    t = the k-th largest of the candidates                  (by histograms of 8 bits each, the leading ones first)
    keep those above t, and of those equal to t the first ones, in the same two passes, over the candidates

Magnitudes are compared by the bits of the floats without the sign, as integers, which is the same order; a NaN comes
above infinity. With fewer than k candidates the bound is taken from the whole vector, which is a third pass. Ascending
indices, and so ties, come from the order of the tiles, never from the order in which programs run: only the counts of
histograms are added by atomics, and integers add up to the same in any order.

The histogram of a tile takes work that grows with its bins, so that the one over the vector is of a sample, and those
with many bins are of few entries. The host waits once, for the number of candidates, without which it could neither
make room for them nor raise an error; not at all for the threshold, which stays on the device.

Every function here takes the vector as ``x``, or as ``x - y`` without forming it; `y` of None leaves it out.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.errors import DivergenceError
from mpicomp.kernels.gpu.compiled import BLOCK, jit, launch, offsets, tiles
from mpicomp.kernels.reference import NAN

_SAMPLE = 2**16
"""Entries of a sample; shorter vectors are looked at as a whole."""

_SURE = 4.0
"""Standard deviations between the bound that is taken from the sample and the one aimed at."""

_LEADING = 11
"""Bits of the histogram that gives the bound: the exponent of float32 and 3 more, that of float64 and none."""

_DIGIT = 8
"""Bits of the histograms that give the threshold."""

_PROGRAMS = 512
"""Programs that make a histogram, each of many tiles: a few for every multiprocessor of a GPU."""


def top_k(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices of the `k` >= 1 entries largest in magnitude; see `reference.top_k`."""
    one_in = max(1, len(x) // _SAMPLE)
    rank = _more_than(k / one_in)
    if rank > len(x) // one_in:  # nearly all are wanted
        one_in = 1
    low = _bound(x, y, k if one_in == 1 else rank, one_in)
    ends, found = _survey(x, y, low)
    if found < k:
        low = _bound(x, y, k, 1)
        ends, found = _survey(x, y, low)
    candidates, places = _collect(x, y, low, ends, found)
    return (candidates, places) if found == k else _largest(candidates, places, k)


def above(x: Tensor, y: Tensor | None, threshold: float) -> tuple[Tensor, Tensor]:
    """Return values and indices of the entries with ``|x_i| >= threshold``; see `reference.above`."""
    number = torch.full((1,), threshold, dtype=torch.float64, device=x.device).to(x.dtype)  # 1e300 becomes infinity
    low = number.view(torch.int64 if x.dtype == torch.float64 else torch.int32).long()
    return _collect(x, y, low, *_survey(x, y, low))


def _more_than(expected: float) -> int:
    """Return a bound that a count, binomial with that mean, does not exceed but by bad luck."""
    return math.ceil(expected + _SURE * (math.sqrt(expected) + 1))


def _bits(x: Tensor) -> int:
    """Return the bits of a magnitude."""
    return 8 * x.element_size() - 1


def _bound(x: Tensor, y: Tensor | None, rank: int, one_in: int) -> Tensor:
    """Return the state of the search for the largest of that `rank` in a sample, after its leading bits."""
    state = torch.zeros(2 + 2**_LEADING, dtype=torch.int64, device=x.device)
    _search(x, y, rank, one_in, state, state[2:], _bits(x) - _LEADING, _LEADING)
    return state


def _search(
    x: Tensor, y: Tensor | None, rank: int, one_in: int, state: Tensor, counts: Tensor, shift: int, width: int
) -> None:
    """Find the next `width` bits, from bit `shift` on, of the largest of that `rank` in one entry of so many.

    `state` is the magnitude as far as it is known, the bits to come being zeros, and how many entries are in bins above
    its own.
    """
    size = len(x) // one_in
    programs = min(tiles(size), _PROGRAMS)
    launch(_histogram, programs, x, y, state, counts, size, one_in, SHIFT=shift, WIDTH=width, BLOCK=BLOCK)
    launch(_pick, 1, state, counts, rank, SHIFT=shift, WIDTH=width)


def _survey(x: Tensor, y: Tensor | None, low: Tensor) -> tuple[Tensor, int]:
    """Return the number of entries that reach `low` up to the end of each tile, and of all; waits for the device."""
    counts = torch.zeros(2, max(1, tiles(len(x))), dtype=torch.int32, device=x.device)
    launch(_count, tiles(len(x)), x, y, low, counts, len(x), ALL=True, BLOCK=BLOCK)
    ends = counts.cumsum(1)
    found, nans = ends[:, -1].tolist()
    if nans:
        raise DivergenceError(NAN)
    return ends, found


def _collect(x: Tensor, y: Tensor | None, low: Tensor, ends: Tensor, found: int) -> tuple[Tensor, Tensor]:
    """Return the entries that reach `low`."""
    values, indices = x.new_empty(found), torch.empty(found, dtype=torch.int32, device=x.device)
    launch(_emit, tiles(len(x)), x, y, None, low, ends, values, indices, len(x), 0, ALL=True, BLOCK=BLOCK)
    return values, indices


def _largest(x: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` largest of entries that have the given `places`, which ascend."""
    digits, n = tiles(_bits(x), _DIGIT), len(x)
    state = torch.zeros(2 + digits * 2**_DIGIT, dtype=torch.int64, device=x.device)
    for digit, counts in enumerate(state[2:].view(digits, 2**_DIGIT), start=1):
        _search(x, None, k, 1, state, counts, (digits - digit) * _DIGIT, _DIGIT)
    tallies = torch.empty(2, tiles(n), dtype=torch.int32, device=x.device)
    launch(_count, tiles(n), x, None, state, tallies, n, ALL=False, BLOCK=BLOCK)
    values, indices = x.new_empty(k), torch.empty(k, dtype=torch.int32, device=x.device)
    ends = tallies.cumsum(1)
    launch(_emit, tiles(n), x, None, places, state, ends, values, indices, n, k, ALL=False, BLOCK=BLOCK)
    return values, indices


@jit
def _entries(x: tensor, y: tensor, i: tensor, inside: tensor) -> tensor:
    """Return the entries at places `i`, where they are inside the vector, and zeros."""
    entries = tl.load(x + i, mask=inside, other=0.0)
    if y is not None:
        entries -= tl.load(y + i, mask=inside, other=0.0)
    return entries


@jit
def _magnitudes(entries: tensor) -> tensor:
    """Return the bits of floats without their signs: they order as magnitudes do, NaN last."""
    if entries.dtype == tl.float64:
        return entries.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:  # noqa: RET505 - Triton compiles what follows a return, too
        return entries.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _histogram(
    x: tensor,
    y: tensor,
    state: tensor,
    counts: tensor,
    size: tensor,
    one_in: tensor,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count the bits from SHIFT on of one entry in `one_in`, if the bits before are those of the state.

    It is from anywhere in its part of the vector: the rows of matrices have periods, which equal steps might hit.
    """
    low = tl.load(state)
    total = tl.zeros((1 << WIDTH,), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        i = offsets(tile, BLOCK)
        inside = i < size
        random = i.to(tl.uint32) * 0x9E3779B1
        random = (random ^ random >> 15).to(tl.int64)
        bits = _magnitudes(_entries(x, y, i * one_in + (random * one_in >> 32), inside))
        fits = inside & ((bits >> SHIFT >> WIDTH) == (low.to(bits.dtype) >> SHIFT >> WIDTH))
        digit = (bits >> SHIFT) & ((1 << WIDTH) - 1)
        total += tl.histogram(digit.to(tl.int32), 1 << WIDTH, mask=fits)
    tl.atomic_add(counts + tl.arange(0, 1 << WIDTH), total.to(tl.int64), mask=total > 0, sem="relaxed")


@jit
def _pick(state: tensor, counts: tensor, rank: tensor, SHIFT: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Find the bin of the entry of that `rank` from above, and bring the state up to date."""
    bins = tl.arange(0, 1 << WIDTH)
    count = tl.load(counts + bins)
    passed = tl.load(state + 1)
    reach = passed + tl.cumsum(count, reverse=True)  # entries in this bin or above it: falls with the bin
    digit = tl.sum((reach >= rank).to(tl.int64)) - 1
    tl.store(state, tl.load(state) | digit << SHIFT)
    tl.store(state + 1, passed + tl.sum(tl.where(bins > digit, count, 0)))


@jit
def _count(
    x: tensor,
    y: tensor,
    state: tensor,
    counts: tensor,
    n: tensor,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Count in each tile: with `ALL` entries that reach the magnitude in `state`, and NaNs; else above, and equal."""
    tile = tl.program_id(0)
    i = offsets(tile, BLOCK)
    inside = i < n
    entries = _entries(x, y, i, inside)
    bits = _magnitudes(entries)
    low = tl.load(state).to(bits.dtype)
    if ALL:
        first = inside & (bits >= low)
        second = entries != entries
    else:
        first = inside & (bits > low)
        second = inside & (bits == low)
    tl.store(counts + tile, tl.sum(first.to(tl.int32)))
    tl.store(counts + tl.num_programs(0) + tile, tl.sum(second.to(tl.int32)))


@jit
def _emit(
    x: tensor,
    y: tensor,
    places: tensor,
    state: tensor,
    ends: tensor,
    values: tensor,
    indices: tensor,
    n: tensor,
    k: tensor,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write what `_count` has counted: with `ALL` all, else the entries above and the first equal ones, up to `k`."""
    tile = tl.program_id(0)
    i = offsets(tile, BLOCK)
    inside = i < n
    entries = _entries(x, y, i, inside)
    bits = _magnitudes(entries)
    low = tl.load(state).to(bits.dtype)
    start = tl.load(ends + tile - 1, mask=tile > 0, other=0)
    if ALL:
        kept = inside & (bits >= low)
    else:
        larger = inside & (bits > low)
        ties = inside & (bits == low)
        room = k - tl.load(state + 1)
        before = tl.load(ends + tl.num_programs(0) + tile - 1, mask=tile > 0, other=0)
        kept = larger | (ties & (before + tl.cumsum(ties.to(tl.int32)) <= room))
        start += tl.minimum(before, room)
    place = start + tl.cumsum(kept.to(tl.int32)) - 1
    tl.store(values + place, entries, mask=kept)
    index = tl.load(places + i, mask=kept, other=0) if places is not None else i.to(tl.int32)
    tl.store(indices + place, index, mask=kept)
