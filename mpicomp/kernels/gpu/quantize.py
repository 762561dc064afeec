"""Signs and levels, packed 8 entries to a byte, and the sums that their scales need.

Sums fold blocks of 2**10 entries in halves, as the definition does: `tl.sum` adds in an order that is Triton's affair.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import divide, jit, launch, offsets, rounded, tiles
from mpicomp.kernels.gpu.pack import load_codes, matrix, store_codes

_FOLD = 2**10
_WIDTH = 64
"""Entries that are left of a block when it has been folded by loads far apart; the rest are folded by exchanges."""

_ROWS = 8
"""Blocks of a sum that one program folds."""


def total(x: Tensor, square: bool) -> Tensor:
    """Return the sum of the magnitudes, or of the squares, of `x`, float64 (1,)."""
    while True:
        sums = torch.zeros(max(1, tiles(len(x), _FOLD)), dtype=torch.float64, device=x.device)
        launch(
            _fold, tiles(len(x), _FOLD * _ROWS), x, sums, len(x),
            SQUARE=square, FOLD=_FOLD, WIDTH=_WIDTH, LEVELS=_WIDTH.bit_length() - 1, ROWS=_ROWS,
        )  # fmt: skip
        if len(sums) == 1:
            return sums
        x, square = sums, False


@jit
def _terms(x: tensor, i: tensor, n: tensor, SQUARE: tl.constexpr) -> tensor:
    """Return what entries `i` add to the sum, in float64."""
    part = tl.load(x + i, mask=i < n, other=0.0).to(tl.float64)
    return part * part if SQUARE else tl.abs(part)


@jit
def _loaded(
    x: tensor,
    i: tensor,
    n: tensor,
    SQUARE: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tensor:
    """Return blocks folded to their first `WIDTH` entries, which are at `i`: the halves of twice as many, added.

    Folded after they were loaded as a whole, blocks of aligned float32 would be given to so few threads that each would
    keep 1000 numbers, in local memory.
    """
    if WIDTH == FOLD:
        return _terms(x, i, n, SQUARE)
    else:  # noqa: RET505 - Triton compiles what follows a return, too
        first = _loaded(x, i, n, SQUARE, FOLD, 2 * WIDTH)
        return first + _loaded(x, i + WIDTH, n, SQUARE, FOLD, 2 * WIDTH)


@jit
def _fold(
    x: tensor,
    sums: tensor,
    n: tensor,
    SQUARE: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write the sum of each block of `x` in float64."""
    row = offsets(tl.program_id(0), ROWS)
    i = row[:, None] * FOLD + tl.arange(0, WIDTH)[None, :]
    part = _loaded(x, i, n, SQUARE, FOLD, WIDTH)
    for level in tl.static_range(LEVELS):
        halves = tl.permute(tl.reshape(part, (ROWS, 2, (WIDTH // 2) >> level)), (0, 2, 1))
        first, second = tl.split(halves)
        part = first + second
    tl.store(sums + row, tl.reshape(part, (ROWS,)), mask=row * FOLD < n)


@jit
def _noise(i: tensor, low: tensor, high: tensor) -> tensor:
    """Return the noise of entries `i` for the two halves of a seed; see `reference.noise`."""
    word = i.to(tl.uint32) * 0x9E3779B1 + low.to(tl.uint32)
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) ^ high.to(tl.uint32)
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return ((word ^ (word >> 16)) >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@jit
def noise(out: tensor, low: tensor, high: tensor, n: tensor, BLOCK: tl.constexpr) -> None:
    """Fill `out` with noise."""
    i = offsets(tl.program_id(0), BLOCK)
    tl.store(out + i, _noise(i, low, high), mask=i < n)


@jit
def quantize(
    x: tensor,
    packed: tensor,
    unit: tensor,
    low: tensor,
    high: tensor,
    n: tensor,
    groups: tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Write signs and levels of `BITS` bits, plane after plane; see `reference.quantize`."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    entries = tl.load(x + i, mask=i < n, other=0.0)
    size = rounded(tl.load(unit), entries)
    size = tl.where(size > 0, size, float("inf"))
    level = divide(tl.abs(entries), size) + _noise(i, low, high).to(entries.dtype)
    level = tl.where(level < (1 << BITS) - 1, level, (1 << BITS) - 1).to(tl.int32)
    codes = tl.where(i < n, level << 1 | (entries < 0).to(tl.int32), 0)
    store_codes(packed, codes, group, groups, BITS + 1)


@jit
def _step(scale: tensor, weight: tensor, like: tensor) -> tensor:
    """Return ``weight * scale``, formed in float64, in the type of `like`; the host does not see the scale."""
    return rounded(tl.load(scale).to(tl.float64) * weight, like)


@jit
def add_quantized(
    out: tensor,
    packed: tensor,
    scale: tensor,
    weight: tl.float64,
    n: tensor,
    groups: tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """``out += weight * scale * levels`` with their signs."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    codes = load_codes(packed, group, groups, BITS + 1, GROUPS)
    entries = tl.load(out + i, mask=i < n, other=0.0)
    signed = ((codes >> 1) * (1 - 2 * (codes & 1))).to(entries.dtype)
    tl.store(out + i, tl.fma(signed, _step(scale, weight, entries), entries), mask=i < n)


@jit
def round_to_grid(
    x: tensor,
    packed: tensor,
    middles: tensor,
    unit: tensor,
    count: tensor,
    n: tensor,
    groups: tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Write signs and places among `count` middles, plane after plane; see `reference.round_to_grid`."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    entries = tl.load(x + i, mask=i < n, other=0.0)
    size = rounded(tl.load(unit), entries)
    size = tl.where(size > 0, size, float("inf"))
    parts = divide(tl.abs(entries), size)
    codes = (entries < 0).to(tl.int32)
    for middle in range(count):
        codes += 2 * (parts >= tl.load(middles + middle)).to(tl.int32)
    store_codes(packed, tl.where(i < n, codes, 0), group, groups, BITS)


@jit
def add_gridded(
    out: tensor,
    packed: tensor,
    table: tensor,
    scale: tensor,
    weight: tl.float64,
    n: tensor,
    groups: tensor,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """``out += weight * scale * table[code]``."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    grid = tl.load(table + load_codes(packed, group, groups, BITS, GROUPS))
    entries = tl.load(out + i, mask=i < n, other=0.0)
    tl.store(out + i, tl.fma(grid, _step(scale, weight, entries), entries), mask=i < n)


@jit
def pack_signs(x: tensor, packed: tensor, n: tensor, groups: tensor, GROUPS: tl.constexpr) -> None:
    """Write ``x >= 0``, a bit an entry."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    positive = (i < n) & (tl.load(x + i, mask=i < n, other=0.0) >= 0)
    store_codes(packed, positive.to(tl.int32), group, groups, 1)


@jit
def add_signs(
    out: tensor, packed: tensor, scale: tensor, weight: tl.float64, n: tensor, groups: tensor, GROUPS: tl.constexpr
) -> None:
    """Add ``weight * scale`` where a bit is set, and subtract it elsewhere."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    positive = load_codes(packed, group, groups, 1, GROUPS) == 1
    entries = tl.load(out + i, mask=i < n, other=0.0)
    step = _step(scale, weight, entries)
    tl.store(out + i, entries + tl.where(positive, step, -step), mask=i < n)
