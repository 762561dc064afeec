"""Index codes, 64 indices at a time: see `reference.encode_indices` for what they are.

The unary parts have a stream of their own, so that reading an index needs not wait for the length of the one before:
the ones of a word are taken out one by one, and the low bits of 64 gaps come as one word a plane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import (
    LANES,
    bit_plane,
    compiled,
    lowest,
    ones,
    read_bytes,
    set_plane,
    write_bytes,
    write_word,
)

Array = npt.NDArray[Any]

_CHUNK = 2**10
"""Ones that are taken out of the second stream before the gaps that they end are put together."""

SLACK = 8
"""Bytes behind the longest code that `encode` may write to."""


@compiled
def encode(indices: Array, shift: int, code: Array) -> int:
    """Write the code of `indices` (k,), k > 0; return its bytes."""
    k, groups = len(indices), (len(indices) + 7) // 8
    gaps = np.zeros(LANES, np.uint32)
    high_at, word, place, done = shift * groups, np.uint64(0), np.int64(-1), np.int64(0)
    before = np.int32(-1)
    for start in range(0, k, LANES):
        count = min(LANES, k - start)
        group = indices[start : start + count]
        gaps[0] = group[0] - before - 1
        for i in range(count - 1):
            gaps[i + 1] = group[i + 1] - group[i] - 1
        before = group[count - 1]
        gaps[count:] = 0
        nbytes = (count + 7) // 8
        for plane in range(shift):
            write_bytes(bit_plane(gaps, 0, np.uint32(1 << plane)), code, plane * groups + start // 8, nbytes)
        for i in range(count):
            place += (np.int64(gaps[i]) >> shift) + 1
            while place - done >= LANES:
                write_word(code, high_at + done // 8, word)
                word = np.uint64(0)
                done += LANES
            word |= np.uint64(1) << np.uint64(place - done)
    write_word(code, high_at + done // 8, word)
    return int(high_at + place // 8 + 1)


@compiled
def _decode_group(
    code: Array, shift: int, groups: int, start: int, count: int, before: Any, ends: Array, lows: Array, places: Array
) -> Any:
    """Write indices ``start ... start + count - 1`` of a code to `places`, and anything behind; return the last one.

    `ends` are the places of their ones in the second stream, and the one before them; `before` is the index before.
    """
    lows[:] = 0
    nbytes = (count + 7) // 8
    for plane in range(shift):
        set_plane(lows, 0, read_bytes(code, plane * groups + start // 8, nbytes), np.uint32(1 << plane))
    for i in range(LANES):
        places[i] = (((ends[i + 1] - ends[i] - 1) << shift) | np.int64(lows[i])) + 1
    for i in range(LANES):
        before += places[i]
        places[i] = before
    return places[count - 1]


@compiled
def decode(code: Array, shift: int, n: int, values: Array | None, weight: float, out: Array, k: int) -> bool:
    """Write the `k` indices that `code` holds to `out`, or have ``out[indices] += weight * values`` there.

    Returns whether there are just so many, and all below `n`; else part of it has been done.
    """
    groups, at = (k + 7) // 8, shift * ((k + 7) // 8)
    lows, places, ends = np.empty(LANES, np.uint32), np.empty(LANES, np.int64), np.zeros(_CHUNK + LANES, np.int64)
    ends[0] = -1
    waiting, start, index, zero = 0, 0, np.int64(-1), np.int64(0)
    while at < len(code) or waiting > 0:
        while at < len(code) and waiting < _CHUNK - LANES:
            word = read_bytes(code, at, min(8, len(code) - at))
            found, free = ones(word), ends[waiting + 1 :]  # an index that counts up is not checked for being negative
            for i in range(found):
                free[i] = zero + lowest(word)
                word &= word - np.uint64(1)
            waiting += found
            zero += LANES
            at += 8
        done = 0
        while waiting - done >= LANES or (at >= len(code) and waiting > done):
            count = min(LANES, waiting - done)
            if start + count > k:
                return False
            index = _decode_group(code, shift, groups, start, count, index, ends[done:], lows, places)
            if index >= n:
                return False
            if values is None:
                group = out[start : start + count]
                for i in range(count):
                    group[i] = places[i]
            else:
                group, scale = values[start : start + count], out.dtype.type(weight)
                for i in range(count):
                    out[np.uint64(places[i])] += group[i] * scale
            start += count
            done += count
        waiting -= done
        rest = ends[done:]
        for i in range(waiting + 1):
            ends[i] = rest[i]
    return start == k
