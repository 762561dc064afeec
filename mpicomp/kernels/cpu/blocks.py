"""Selection by magnitude in each small block of a vector, in one pass over it.

    low = a bound that a few more than k magnitudes of a block reach, by the k-th largest of the blocks before
    candidates = the entries that reach it                        (the pass over the block)
    t = the k-th largest of the candidates, by bisection          (a count of the candidates is a few instructions)
    keep those above t, and of those equal to t the first ones

With fewer than k candidates, or far too many, the bound is found by bisection over the block, which is in the cache by
then. Whatever the bound, the result is the same. See `select` for magnitudes and for `y`, and
`reference.top_k_of_blocks` for the table of blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import (
    LANES,
    at_least,
    bit_plane,
    compiled,
    lowest,
    magnitude,
    ones,
    read_bytes,
    set_plane,
    write_bytes,
)
from mpicomp.kernels.cpu.select import _above_infinity, _entry, _reaching
from mpicomp.kernels.reference import LARGEST_BLOCK

Array = npt.NDArray[Any]

_ROOM = LARGEST_BLOCK + LANES

_UNROLLED = 4
"""Entries of a word that are written without a branch for each."""

_SURE = 3.0
"""Standard deviations between the bound and the one aimed at."""


@compiled
def _word(x: Array, y: Array | None, at: int, length: int, low: Any) -> Any:
    """Return the word of the entries ``at ... at + length - 1``, at most LANES, whose magnitude is at least `low`."""
    if at + LANES <= len(x):
        word = _reaching(x, y, at, low)
        return word if length == LANES else word & ((np.uint64(1) << np.uint64(length)) - np.uint64(1))
    word = np.uint64(0)
    for i in range(length):
        word |= np.uint64(magnitude(_entry(x, y, at + i)) >= low) << np.uint64(i)
    return word


@compiled
def _count(x: Array, y: Array | None, start: int, width: int, stride: int, size: int, low: Any) -> int:
    """Return how many entries of a block reach `low`."""
    bits, count = np.uint64(low), 0
    for row in range(size // width):
        for column in range(0, width, LANES):
            count += ones(_word(x, y, start + row * stride + column, min(LANES, width - column), bits))
    return count


@compiled
def _collect(
    x: Array, y: Array | None, start: int, width: int, stride: int, size: int, low: Any, at: Array, place: Array
) -> int:
    """Write where the entries that reach `low` lie in the vector, and in the block; return how many they are."""
    bits, count = np.uint64(low), 0
    for row in range(size // width):
        for column in range(0, width, LANES):
            head, local = start + row * stride + column, row * width + column
            word = _word(x, y, head, min(LANES, width - column), bits)
            end = count + ones(word)
            for i in range(_UNROLLED):  # what is beyond the end is written over
                bit = lowest(word)
                at[np.uint64(count + i)], place[np.uint64(count + i)] = head + bit, local + bit
                word &= word - np.uint64(1)
            count += _UNROLLED
            while word:
                bit = lowest(word)
                at[np.uint64(count)], place[np.uint64(count)] = head + bit, local + bit
                word &= word - np.uint64(1)
                count += 1
            count = end
    return count


@compiled
def _collect_with_ties(
    x: Array,
    y: Array | None,
    start: int,
    width: int,
    stride: int,
    size: int,
    low: Any,
    ties: Any,
    at: Array,
    place: Array,
) -> int:
    """Collect the entries above `low`, and the first `ties` equal to it."""
    bits, count = np.uint64(low), 0
    for row in range(size // width):
        for column in range(0, width, LANES):
            head, local = start + row * stride + column, row * width + column
            word = _word(x, y, head, min(LANES, width - column), bits if ties > 0 else bits + np.uint64(1))
            while word:
                bit = lowest(word)
                word &= word - np.uint64(1)
                if magnitude(_entry(x, y, head + bit)) == bits:
                    if ties == 0:
                        continue
                    ties -= 1
                at[count], place[count] = head + bit, local + bit
                count += 1
    return count


@compiled
def _bound(
    x: Array, y: Array | None, start: int, width: int, stride: int, size: int, k: int, most: int, guess: Any, step: Any
) -> Any:
    """Return a bound that `k` to `most` entries reach, and -1.

    If equal entries allow none, the largest bound that `k` reach, and how many of those equal to it are wanted.
    """
    low, top = np.int64(0), _top(x)
    high, middle, above = top, max(np.int64(1), guess), 0
    while high - low > 1:
        count = _count(x, y, start, width, stride, size, middle)
        if count < k:
            high, above = middle, count
        elif count > most:
            low = middle
        else:
            return middle, -1
        middle = _next(low, high, top, step)
        step *= 2
    return low, k - above


@compiled
def _top(x: Array) -> Any:
    """Return a bound that no magnitude reaches, but for a NaN."""
    return np.int64(np.iinfo(np.int64).max if x.itemsize == 8 else 2**31)


@compiled
def _next(low: Any, high: Any, top: Any, step: Any) -> Any:
    """Return what to try next between two bounds: a step from the one that is known, or the middle between both."""
    if high == top and low < top - step:
        return low + step
    if low == 0:  # 1 tells whether all that are wanted differ from zero
        return high - step if high > step + 1 else 1
    return low + (high - low) // 2


@compiled
def _reach(candidates: Array, count: int, low: Any) -> int:
    """Return how many of the first `count` candidates, which zeros follow, reach `low` > 0."""
    found = 0
    for start in range(0, count, LANES):
        found += ones(at_least(candidates, start, np.uint64(low)))
    return found


@compiled
def _threshold(candidates: Array, count: int, k: int, low: Any, step: Any) -> Any:
    """Return t, and how many of the candidates equal to t are wanted besides the larger ones; all of them reach `low`.

    Where no two are equal, bisection may end before t is exact: then t lies just below the k-th largest.
    """
    if count == k:
        return low, k
    top, above = _top(candidates), 0
    high, middle = top, low + step
    while high - low > 1:
        found = _reach(candidates, count, middle)
        if found == k:
            return middle - 1, 0
        if found < k:
            high, above = middle, found
        else:
            low = middle
        middle = _next(low, high, top, step)
        step *= 2
    return low, k - above


@compiled
def _write_with_ties(
    candidates: Array, place: Array, count: int, t: Any, ties: Any, values: Array, places: Array
) -> None:
    """Write the candidates above `t`, and the first `ties` equal to it."""
    out = 0
    for i in range(count):
        bits = np.int64(magnitude(candidates[i]))
        equal = bits == t
        values[out], places[out] = candidates[i], place[i]
        out += (bits > t) | (equal & (ties > 0))
        ties -= equal


@compiled
def top_k_of_blocks(x: Array, y: Array | None, table: Array, values: Array, places: Array) -> bool:
    """Write the largest entries of each block, and their places in it; both need room for one entry more.

    Returns:
        whether there is no NaN; with one, the outputs mean nothing.

    """
    at, place = np.empty(_ROOM, np.uint64), np.empty(_ROOM, np.int16)
    candidates, nan = np.empty(_ROOM, x.dtype), np.int64(_above_infinity(x))
    octave = np.int64(magnitude(x.dtype.type(2)) - magnitude(x.dtype.type(1)))
    guess, margin = np.int64(0), octave // 16
    for b in range(len(table)):
        start, width, stride, size, k, first = table[b]
        low, most = (guess, 2 * k + LANES) if size > 2 * k + LANES else (np.int64(0), size)
        count = 0
        if low > 0 or most == size:
            count = _collect(x, y, start, width, stride, size, low, at, place)
        is_good = k <= count <= most
        if not is_good:
            low, ties = _bound(x, y, start, width, stride, size, k, most, guess, octave // 8)
            if ties < 0:
                count = _collect(x, y, start, width, stride, size, low, at, place)
            else:
                count = _collect_with_ties(x, y, start, width, stride, size, low, ties, at, place)
        for i in range(count):
            candidates[i] = _entry(x, y, at[i])
        candidates[count : count + LANES] = 0
        if _reach(candidates, count, nan):
            return False
        t, ties = _threshold(candidates, count, k, low, margin // 4 + 1)
        if ties:
            _write_with_ties(candidates, place, count, t, ties, values[first:], places[first:])
        else:
            out = np.uint64(first)
            for i in range(count):
                values[out], places[out] = candidates[i], place[i]
                out += np.uint64(magnitude(candidates[i]) > np.uint64(t))
        if low > 0 and count > k:
            margin = min(octave // 2, np.int64(_SURE * np.sqrt(k) * (t - low) / (count - k)))
        aim = max(np.int64(0), t - margin)
        guess = guess + (aim - guess) // 4 if is_good and low > 0 else aim
    return True


@compiled
def pack(codes: Array, bits: int, packed: Array) -> None:
    """Write `codes`, uint16, in bit planes; see `reference.pack_codes`."""
    n, groups, last = len(codes), len(packed) // bits, np.zeros(LANES, codes.dtype)
    for start in range(0, n, LANES):
        lanes = codes[start : start + LANES]
        nbytes = min(8, -(-len(lanes) // 8))
        if len(lanes) < LANES:
            last[: len(lanes)] = lanes
            lanes = last
        for plane in range(bits):
            write_bytes(bit_plane(lanes, 0, np.uint16(1 << plane)), packed, start // 8 + plane * groups, nbytes)


@compiled
def indices(packed: Array, table: Array, bits: int, out: Array) -> bool:
    """Write the indices in the vector of the places in `packed`; return whether all of these are in their block."""
    groups, codes = len(packed) // bits, np.empty(LANES, np.uint16)
    b = np.int64(-1)
    start, width, stride, size, end = np.int64(0), np.int64(1), np.int64(0), np.int64(0), np.int64(0)
    for head in range(0, len(out), LANES):
        count = min(LANES, len(out) - head)
        codes[:] = 0
        for plane in range(bits):
            word = read_bytes(packed, head // 8 + plane * groups, -(-count // 8))
            set_plane(codes, 0, word, np.uint16(1 << plane))
        for i in range(count):
            while head + i == end:
                b += 1
                start, width, stride, size, k, first = table[b]
                end = first + k
            place = np.int64(codes[i])
            if place >= size:
                return False
            row = place >> 6 if width == LANES else np.int64(np.uint32(place) // np.uint32(width))
            out[head + i] = start + row * stride + place - row * width
    return True
