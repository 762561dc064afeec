"""Selection by magnitude, in one pass over the vector when a sample guesses well.

    low = a bound that, by a sample, a few more than k magnitudes reach
    candidates = the entries that reach it                        (the pass over the vector)
    t = the k-th largest of the candidates                        (by histograms of their bits)
    keep those above t, and of those equal to t the first ones

Magnitudes are compared by the bits of the floats without the sign, as integers, which is the same order; a NaN comes
above infinity. With fewer than k candidates, or far too many, t is found by histograms over the whole vector instead,
and one more pass collects; this is slower, but the result is the same.

Every function here takes the vector as ``x``, or as ``x - y`` without forming it; `y` of None leaves it out.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import LANES, at_least, compiled, difference_at_least, lowest, magnitude, ones

Array = npt.NDArray[Any]

_SAMPLED_FROM = 2**12
"""The length of a vector from which on sampling is faster."""

_LEAST_SAMPLE, _LARGEST_SAMPLE, _ONE_IN = 2**10, 2**16, 128
"""A sample is one entry in so many, within the bounds."""

_SURE = 4.0
"""Standard deviations between the bound that is taken from the sample and the one aimed at."""

_BINS = 2**12

_FEW, _FEWER_BINS = 2**12, 2**8
"""Of fewer entries than these, so many bins are made: clearing and searching more would take longer."""


_rooms: list[npt.NDArray[np.uint8]] = []
"""Room for candidates that no thread uses now. It is kept, because fresh pages would cost as much as the selection, and
passed on, because of the many ranks of a loopback few run at a time."""


def _take_room(nbytes: int) -> npt.NDArray[np.uint8]:
    """Return at least `nbytes` bytes with any content, the last ones given back to `_rooms` if they suffice."""
    with suppress(IndexError):
        room = _rooms.pop()
        if len(room) >= nbytes:
            return room
    return np.empty(nbytes, np.uint8)


def top_k(x: Array, y: Array | None, k: int, values: Array, indices: Array) -> bool:
    """Write the `k` entries largest in magnitude by ascending index, those of lowest index among equal ones.

    Returns:
        whether there is no NaN; with one, the outputs mean nothing.

    """
    if not k:
        return not bool(_has_nan(x, y))
    n = len(x)
    sample = min(_LARGEST_SAMPLE, max(_LEAST_SAMPLE, n // _ONE_IN))
    rank = _above(k * sample / n)
    if n >= _SAMPLED_FROM and rank < sample:
        count = int(_above(rank) * n / sample)
        middle, stop = count * x.dtype.itemsize, count * (x.dtype.itemsize + 4)
        room = _take_room(stop)
        candidates = room[:middle].view(x.dtype), room[middle:stop].view(np.int32)
        done = _top_k_of_candidates(x, y, k, sample, rank, *candidates, values, indices)
        _rooms.append(room)
        if done >= 0:
            return bool(done)
    return _top_k_of_all(x, y, k, values, indices)


def above(x: Array, threshold: float) -> tuple[Array, Array] | None:
    """Return values and indices of the entries with ``|x_i| >= threshold``, or None if there is a NaN."""
    low, found, has_nan = _survey(x, threshold)
    if has_nan:
        return None
    values, indices = np.empty(found, x.dtype), np.empty(found, np.int32)
    _emit(x, None, None, np.uint64(low), found, values, indices)
    return values, indices


def _above(expected: float) -> int:
    """Return a bound that a count, binomial with that mean, does not exceed but by bad luck."""
    return int(expected + _SURE * (expected**0.5 + 1))


@compiled
def _above_infinity(x: Array) -> Any:
    """Return the least magnitude of a NaN."""
    return magnitude(x.dtype.type(np.inf)) + np.uint64(1)


@compiled
def _entry(x: Array, y: Array | None, i: Any) -> Any:
    """Return entry `i`."""
    return x[i] if y is None else x[i] - y[i]


@compiled
def _reaching(x: Array, y: Array | None, start: int, low: Any) -> Any:
    """Return the word of the entries ``start ... start + LANES - 1`` whose magnitude is at least `low`."""
    return at_least(x, start, low) if y is None else difference_at_least(x, y, start, low)


@compiled
def _has_nan(x: Array, y: Array | None) -> Any:
    """Return whether there is a NaN."""
    nan, nans, whole = _above_infinity(x), np.uint64(0), len(x) - len(x) % LANES
    for start in range(0, whole, LANES):
        nans |= _reaching(x, y, start, nan)
    for i in range(whole, len(x)):
        nans |= np.uint64(magnitude(_entry(x, y, i)) >= nan)
    return nans != np.uint64(0)


@compiled
def _survey(x: Array, threshold: float) -> Any:
    """Return the magnitude of `threshold` in the type of `x`, how many reach it, and whether there is a NaN."""
    low, nan = magnitude(x.dtype.type(threshold)), _above_infinity(x)
    found, nans, whole = 0, np.uint64(0), len(x) - len(x) % LANES
    for start in range(0, whole, LANES):
        found += ones(at_least(x, start, low))
        nans |= at_least(x, start, nan)
    for i in range(whole, len(x)):
        found += magnitude(x[i]) >= low
        nans |= np.uint64(magnitude(x[i]) >= nan)
    return low, found, nans != np.uint64(0)


@compiled
def _emit(x: Array, y: Array | None, places: Array | None, t: Any, ties: int, values: Array, indices: Array) -> int:
    """Write the entries whose magnitude is above `t`, and the first `ties` of those equal to it, in their order.

    The index of entry i is ``places[i]``, or i for None. Returns how many they are, or -1 if there is no room for them.
    """
    n, count, room = len(x), 0, len(indices)
    whole = n - n % LANES
    for start in range(0, whole, LANES):
        word = _reaching(x, y, start, t if ties > 0 else t + np.uint64(1))
        while word:
            i = start + lowest(word)
            word &= word - np.uint64(1)
            value = _entry(x, y, i)
            if magnitude(value) == t:
                if ties == 0:
                    continue
                ties -= 1
            if count == room:
                return -1
            values[count] = value
            indices[count] = i if places is None else places[i]
            count += 1
    for i in range(whole, n):
        value = _entry(x, y, i)
        bits = magnitude(value)
        if bits > t or (bits == t and ties > 0):
            if count == room:
                return -1
            ties -= bits == t
            values[count] = value
            indices[count] = i if places is None else places[i]
            count += 1
    return count


@compiled
def _kth_largest(x: Array, y: Array | None, k: int) -> Any:
    """Return the k-th largest magnitude, how many are larger, and the largest.

    Each round makes a histogram of further bits, of the entries in the bin that holds the k-th largest.
    """
    low = largest = magnitude(_entry(x, y, 0))
    for i in range(len(x)):
        bits = magnitude(_entry(x, y, i))
        low = min(low, bits)
        largest = max(largest, bits)
    histogram = np.zeros(_BINS if len(x) >= _FEW else _FEWER_BINS, np.int64)
    shift = _shift(largest - low, len(histogram))
    for i in range(len(x)):
        histogram[np.int64((magnitude(_entry(x, y, i)) - low) >> shift)] += 1
    at, above = _bin(histogram, k, 0)
    low += np.uint64(at) << shift
    if shift == np.uint64(0):
        return low, above, largest
    high = low + (np.uint64(1) << shift) - np.uint64(1)
    members = np.empty(histogram[at] + 1, np.uint64)  # what is not kept is written over, to do without a branch
    count = 0
    for i in range(len(x)):
        bits = magnitude(_entry(x, y, i))
        members[count] = bits
        count += (bits >= low) & (bits <= high)
    while count > 1:
        shift = _shift(high - low, len(histogram))
        histogram[:] = 0
        for i in range(count):
            histogram[np.int64((members[i] - low) >> shift)] += 1
        at, above = _bin(histogram, k, above)
        low += np.uint64(at) << shift
        if shift == np.uint64(0):
            return low, above, largest
        high = low + (np.uint64(1) << shift) - np.uint64(1)
        kept = 0
        for i in range(count):
            bits = members[i]
            members[kept] = bits
            kept += (bits >= low) & (bits <= high)
        count = kept
    return members[0], above, largest


@compiled
def _shift(span: Any, bins: int) -> Any:
    """Return how many trailing bits to drop so that `span` falls into one of the bins."""
    shift = np.uint64(0)
    while span >> shift >= np.uint64(bins):
        shift += np.uint64(1)
    return shift


@compiled
def _bin(histogram: Array, k: int, above: int) -> Any:
    """Return the bin of the k-th largest, where `above` are above all bins, and how many are above that bin."""
    at = len(histogram) - 1
    while above + histogram[at] < k:
        above += histogram[at]
        at -= 1
    return at, above


@compiled
def _sample(x: Array, y: Array | None, sample: Array) -> None:
    """Fill `sample` with entries from all over the vector, one from anywhere in each of its equal parts."""
    part = np.uint64(len(x) // len(sample))
    random = np.uint32(1)  # the rows of matrices have periods, which equal steps might hit
    for i in range(len(sample)):
        random = np.uint32(random * np.uint32(1664525) + np.uint32(1013904223))  # of Numerical Recipes
        place = np.int64((np.uint64(random) * part) >> np.uint64(32))
        sample[i] = _entry(x, y, np.int64(part) * i + place)


@compiled
def _top_k_of_candidates(
    x: Array,
    y: Array | None,
    k: int,
    sampled: int,
    rank: int,
    candidates: Array,
    places: Array,
    values: Array,
    indices: Array,
) -> int:
    """Select among the entries that reach the one of the given `rank` in a sample.

    Returns 1; 0 if there is a NaN; -1 if the bound was a bad one.
    """
    sample = np.empty(sampled, x.dtype)
    _sample(x, y, sample)
    low, _, _ = _kth_largest(sample, None, rank)
    if low == np.uint64(0):
        return -1
    count = _emit(x, y, None, low - np.uint64(1), 0, candidates, places)
    if count < k:
        return -1
    t, above, largest = _kth_largest(candidates[:count], None, k)
    if largest >= _above_infinity(x):
        return 0
    _emit(candidates[:count], None, places[:count], t, k - above, values, indices)
    return 1


@compiled
def _top_k_of_all(x: Array, y: Array | None, k: int, values: Array, indices: Array) -> bool:
    """Select among all entries; return whether there is no NaN."""
    t, above, largest = _kth_largest(x, y, k)
    if largest >= _above_infinity(x):
        return False
    _emit(x, y, None, t, k - above, values, indices)
    return True
