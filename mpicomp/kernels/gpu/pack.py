"""Codes of a few bits in bit planes, as `reference.pack_codes` lays them out.

A tile is a matrix with 8 entries in a row, so that the bits of a row make a byte of each plane.
"""

from __future__ import annotations

import triton.language as tl
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import jit


@jit
def matrix(group: tensor) -> tensor:
    """Return the places of the entries of groups of 8, int64 (groups, 8)."""
    return group[:, None] * 8 + tl.arange(0, 8)[None, :]


@jit
def store_codes(packed: tensor, codes: tensor, group: tensor, groups: tensor, BITS: tl.constexpr) -> None:
    """Write `codes` (groups, 8) in bit planes."""
    for plane in tl.static_range(BITS):
        bits = ((codes >> plane) & 1) << tl.arange(0, 8)[None, :]
        byte = tl.sum(bits, axis=1).to(tl.uint8)
        tl.store(packed + (group + tl.cast(groups, tl.int64) * plane), byte, mask=group < groups)


@jit
def load_codes(packed: tensor, group: tensor, groups: tensor, BITS: tl.constexpr, GROUPS: tl.constexpr) -> tensor:
    """Return codes (groups, 8) from their bit planes."""
    codes = tl.zeros((GROUPS, 8), tl.int32)
    for plane in tl.static_range(BITS):
        byte = tl.load(packed + (group + tl.cast(groups, tl.int64) * plane), mask=group < groups, other=0)
        codes |= ((byte.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) << plane
    return codes
