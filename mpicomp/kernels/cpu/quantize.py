"""Signs and levels, packed 64 entries at a time, and the sums that their scales need.

The bits of 64 entries make a word for each bit plane. Sums fold blocks of 2**10 entries in halves, as the definition
does, which is a fixed order that vector instructions can follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import (
    LANES,
    add_signed,
    bit_plane,
    compiled,
    fused,
    nonnegative,
    read_bytes,
    read_word,
    set_plane,
    write_bytes,
    write_word,
)

Array = npt.NDArray[Any]

_FOLD = 2**10
_ODD, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


@compiled
def fold(x: Array, square: bool, sums: Array) -> None:
    """Write the sum of the magnitudes, or of the squares, of each block of `x` in float64."""
    half = _FOLD // 2
    folded, last = np.empty(half), np.zeros(_FOLD, x.dtype)
    for block in range(len(sums)):
        entries = x[block * _FOLD : (block + 1) * _FOLD]
        if len(entries) < _FOLD:
            last[: len(entries)] = entries
            entries = last
        if square:
            for i in range(half):
                a, b = np.float64(entries[i]), np.float64(entries[i + half])
                folded[i] = a * a + b * b
        else:
            for i in range(half):
                folded[i] = np.abs(np.float64(entries[i])) + np.abs(np.float64(entries[i + half]))
        width = half // 2
        while width:
            for i in range(width):
                folded[i] += folded[i + width]
            width //= 2
        sums[block] = folded[0]


def total(x: Array, square: bool) -> float:
    """Return the sum of the magnitudes or squares."""
    while True:
        sums = np.empty(-(-len(x) // _FOLD))
        fold(x, square, sums)
        if len(sums) <= 1:
            return float(sums[0]) if len(sums) else 0.0
        x, square = sums, False


@compiled
def _noise(i: Any, low: Any, high: Any) -> Any:
    """Return the noise of entry `i` for the two halves of a seed; see `reference.noise`."""
    word = np.uint32(np.uint32(np.uint32(i) * np.uint32(_ODD)) + low)
    word = np.uint32((word ^ (word >> np.uint32(16))) * np.uint32(_FIRST)) ^ high
    word = np.uint32((word ^ (word >> np.uint32(13))) * np.uint32(_SECOND))
    return np.float32(np.int32((word ^ (word >> np.uint32(16))) >> np.uint32(8))) * np.float32(2.0**-24)


@compiled
def noise(out: Array, low: Any, high: Any) -> None:
    """Fill `out` with noise."""
    for i in range(len(out)):
        out[i] = _noise(i, low, high)


@compiled
def quantize(x: Array, unit: float, bits: int, low: Any, high: Any, packed: Array) -> None:
    """Write signs and levels, plane after plane; see `reference.quantize`."""
    n, groups, most = len(x), len(packed) // (bits + 1), x.dtype.type(2**bits - 1)
    size = x.dtype.type(unit)
    size = size if size > 0 else x.dtype.type(np.inf)
    levels, last = np.zeros(LANES, np.uint8), np.zeros(LANES, x.dtype)
    for start in range(0, n, LANES):
        entries = x[start : start + LANES]
        nbytes, used = 8, ~np.uint64(0)
        if len(entries) < LANES:
            nbytes = -(-len(entries) // 8)
            used = (np.uint64(1) << np.uint64(len(entries))) - np.uint64(1)
            last[: len(entries)] = entries
            entries = last
        for i in range(LANES):
            level = np.abs(entries[i]) / size + _noise(start + i, low, high)
            levels[i] = np.uint8(np.int32(level if level < most else most))
        at = start // 8
        write_bytes(~nonnegative(entries, 0) & used, packed, at, nbytes)
        for plane in range(bits):
            word = bit_plane(levels, 0, np.uint8(1 << plane))
            write_bytes(word & used, packed, at + (plane + 1) * groups, nbytes)


@compiled
def add_quantized(out: Array, packed: Array, bits: int, scale: float) -> None:
    """Compute ``out += scale * levels``, with their signs."""
    n, groups, step = len(out), len(packed) // (bits + 1), out.dtype.type(scale)
    levels, signs = np.zeros(LANES, np.uint8), np.zeros(LANES, np.uint8)
    rest = np.zeros(LANES, out.dtype)
    for start in range(0, n, LANES):
        entries = out[start : start + LANES]
        nbytes = 8
        if len(entries) < LANES:
            nbytes = -(-len(entries) // 8)
            rest[: len(entries)] = entries
            entries = rest
        at = start // 8
        levels[:] = 0
        signs[:] = 0
        set_plane(signs, 0, read_bytes(packed, at, nbytes), np.uint8(1))
        for plane in range(bits):
            set_plane(levels, 0, read_bytes(packed, at + (plane + 1) * groups, nbytes), np.uint8(1 << plane))
        for i in range(LANES):
            sign = np.int32(signs[i])
            signed = np.int32((np.int32(levels[i]) ^ -sign) + sign)
            entries[i] = fused(out.dtype.type(signed), step, entries[i])
        if len(out) - start < LANES:
            out[start:] = rest[: n - start]


@compiled
def round_to_grid(x: Array, unit: float, middles: Array, bits: int, packed: Array) -> None:
    """Write signs and places, plane after plane; see `reference.round_to_grid`."""
    n, groups = len(x), len(packed) // bits
    size = x.dtype.type(unit)
    size = size if size > 0 else x.dtype.type(np.inf)
    places, last = np.zeros(LANES, np.uint8), np.zeros(LANES, x.dtype)
    for start in range(0, n, LANES):
        entries = x[start : start + LANES]
        nbytes, used = 8, ~np.uint64(0)
        if len(entries) < LANES:
            nbytes = -(-len(entries) // 8)
            used = (np.uint64(1) << np.uint64(len(entries))) - np.uint64(1)
            last[: len(entries)] = entries
            entries = last
        places[:] = 0
        for middle in middles:
            for i in range(LANES):
                places[i] += np.uint8(np.abs(entries[i]) / size >= middle)
        at = start // 8
        write_bytes(~nonnegative(entries, 0) & used, packed, at, nbytes)
        for plane in range(bits - 1):
            word = bit_plane(places, 0, np.uint8(1 << plane))
            write_bytes(word & used, packed, at + (plane + 1) * groups, nbytes)


@compiled
def add_gridded(out: Array, packed: Array, table: Array, bits: int, scale: float) -> None:
    """Compute ``out += scale * table[code]``."""
    n, groups, step = len(out), len(packed) // bits, out.dtype.type(scale)
    codes, rest = np.zeros(LANES, np.uint8), np.zeros(LANES, out.dtype)
    for start in range(0, n, LANES):
        entries = out[start : start + LANES]
        nbytes = 8
        if len(entries) < LANES:
            nbytes = -(-len(entries) // 8)
            rest[: len(entries)] = entries
            entries = rest
        codes[:] = 0
        for plane in range(bits):
            set_plane(codes, 0, read_bytes(packed, start // 8 + plane * groups, nbytes), np.uint8(1 << plane))
        for i in range(LANES):
            entries[i] = fused(table[codes[i]], step, entries[i])
        if len(out) - start < LANES:
            out[start:] = rest[: n - start]


@compiled
def pack_signs(x: Array, packed: Array) -> None:
    """Write ``x >= 0``, one bit for each entry."""
    whole = len(x) - len(x) % LANES
    for start in range(0, whole, LANES):
        write_word(packed, start // 8, nonnegative(x, start))
    for start in range(whole, len(x), 8):
        packed[start // 8] = 0
        for i in range(min(8, len(x) - start)):
            packed[start // 8] |= (x[start + i] >= 0) << i


@compiled
def add_signs(out: Array, packed: Array, scale: float) -> None:
    """Add `scale` where a bit is set, and subtract it elsewhere."""
    step, whole = out.dtype.type(scale), len(out) - len(out) % LANES
    for start in range(0, whole, LANES):
        add_signed(out, start, read_word(packed, start // 8), step)
    for i in range(whole, len(out)):
        out[i] += step if packed[i // 8] >> (i % 8) & 1 else -step
