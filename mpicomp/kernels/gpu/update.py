"""Updates of a vector in one pass over everything that they read and write.

Products and sums are rounded as the compiled versions on the CPU round them: `tl.fma` where those fuse, else apart.
"""

from __future__ import annotations

import triton.language as tl
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import divide, jit, offsets, root, rounded


@jit
def scatter_add(
    out: tensor, indices: tensor, values: tensor, weight: tl.float64, n: tensor, k: tensor, BLOCK: tl.constexpr
) -> None:
    """``out[indices] += weight * values``; the indices differ, so no two programs meet, and no atomics are needed."""
    i = offsets(tl.program_id(0), BLOCK)
    inside = i < k
    index = tl.load(indices + i, mask=inside, other=0).to(tl.int32)
    if indices.dtype.element_ty == tl.int16:
        index &= 0xFFFF
    inside &= (index >= 0) & (index < n)
    entries = tl.load(out + index, mask=inside, other=0.0)
    added = tl.load(values + i, mask=inside, other=0.0) * rounded(weight, entries)
    tl.store(out + index, entries + added, mask=inside)


@jit
def add_block(
    out: tensor, offset: tensor, values: tensor, weight: tl.float64, n: tensor, k: tensor, BLOCK: tl.constexpr
) -> None:
    """``out[offset : offset + k] += weight * values``; the host does not see the offset."""
    i = offsets(tl.program_id(0), BLOCK)
    place = tl.load(offset).to(tl.int64) + i
    inside = (i < k) & (place >= 0) & (place < n)
    entries = tl.load(out + place, mask=inside, other=0.0)
    added = tl.load(values + i, mask=inside, other=0.0)
    tl.store(out + place, tl.fma(added, rounded(weight, entries), entries), mask=inside)


@jit
def mix(x: tensor, s: tensor, x_hat: tensor, gamma: tl.float64, n: tensor, BLOCK: tl.constexpr) -> None:
    """``x += gamma (s - x_hat)``."""
    i = offsets(tl.program_id(0), BLOCK)
    inside = i < n
    entries = tl.load(x + i, mask=inside, other=0.0)
    r = tl.load(s + i, mask=inside, other=0.0) - tl.load(x_hat + i, mask=inside, other=0.0)
    tl.store(x + i, tl.fma(r, rounded(gamma, r), entries), mask=inside)


@jit
def adaptive_mix(
    x: tensor,
    s: tensor,
    x_hat: tensor,
    v: tensor,
    gamma: tl.float64,
    beta: tl.float64,
    rest: tl.float64,
    correction: tl.float64,
    epsilon: tl.float64,
    clip: tl.float64,
    n: tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The AdaGossip mix, with ``rest = 1 - beta``; the order of the roundings is that of `reference.adaptive_mix_`."""
    i = offsets(tl.program_id(0), BLOCK)
    inside = i < n
    r = tl.load(s + i, mask=inside, other=0.0) - tl.load(x_hat + i, mask=inside, other=0.0)
    second = tl.fma(rounded(rest, r) * r, r, tl.load(v + i, mask=inside, other=0.0) * rounded(beta, r))
    tl.store(v + i, second, mask=inside)
    bottom = root(divide(second, rounded(correction, r))) + rounded(epsilon, r)
    step = divide(rounded(1.0, r), bottom) * rounded(gamma, r)
    step = tl.where(step > rounded(clip, r), rounded(clip, r), step)
    tl.store(x + i, tl.fma(r, step, tl.load(x + i, mask=inside, other=0.0)), mask=inside)
