"""Indices chosen at random; see `reference.random_indices`."""

from __future__ import annotations

import triton.language as tl
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import jit, offsets


@jit
def _feistel(index: tensor, seed: tensor, HALF: tl.constexpr, TURNS: tl.constexpr) -> tensor:
    """Return a bijection of ``[0, 4**HALF)``, keyed by 64 bits, of `index`."""
    left = index >> HALF
    right = index & ((1 << HALF) - 1)
    for turn in tl.static_range(TURNS):
        key = ((seed >> 16 * turn) & 0xFFFF | (turn << 16)) + 1
        mixed = (right + key) * 0x9E3779B1 & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
        mixed = left ^ ((mixed ^ (mixed >> 12)) & ((1 << HALF) - 1))
        left = right
        right = mixed
    return left << HALF | right


@jit
def random_indices(
    out: tensor, seed: tensor, n: tensor, k: tensor, HALF: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Write the images of ``0 ... k - 1``; a tile walks on until all of its images are below `n`."""
    i = offsets(tl.program_id(0), BLOCK)
    word = tl.load(seed)
    image = _feistel(tl.where(i < k, i, 0), word, HALF, TURNS)
    outside = image >= n
    while tl.max(outside.to(tl.int32)) > 0:
        image = tl.where(outside, _feistel(image, word, HALF, TURNS), image)
        outside = image >= n
    tl.store(out + i, image.to(tl.int32), mask=i < k)
