"""Updates of a vector in one pass over everything that they read and write.

Products and sums are rounded as torch rounds them: `fused` where its vector code uses fused multiply-add, else apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import compiled, fused

Array = npt.NDArray[Any]


@compiled
def scatter_add(out: Array, indices: Array, values: Array, weight: float) -> bool:
    """Compute ``out[indices] += weight * values`` for unsigned indices; if one is out of range, only return False."""
    last = indices.dtype.type(0)
    for i in range(len(indices)):
        last = max(last, indices[i])
    if len(indices) and last >= len(out):
        return False
    scale = out.dtype.type(weight)
    for i in range(len(indices)):
        out[indices[i]] += values[i] * scale
    return True


@compiled
def mix(x: Array, s: Array, x_hat: Array, gamma: float) -> None:
    """Compute ``x += gamma (s - x_hat)``."""
    step = x.dtype.type(gamma)
    for i in range(len(x)):
        x[i] = fused(s[i] - x_hat[i], step, x[i])


@compiled
def adaptive_mix(
    x: Array,
    s: Array,
    x_hat: Array,
    v: Array,
    gamma: float,
    beta: float,
    correction: float,
    epsilon: float,
    clip: float,
) -> None:
    """Compute the mixing of AdaGossip, with the order of rounding of `reference.adaptive_mix_`."""
    real = x.dtype.type
    one, keep, add, wide = real(1), real(beta), real(1 - beta), real(correction)
    least, largest, size = real(epsilon), real(clip), real(gamma)
    for i in range(len(x)):
        r = s[i] - x_hat[i]
        second = fused(add * r, r, v[i] * keep)
        v[i] = second
        step = one / (np.sqrt(second / wide) + least) * size
        x[i] = fused(r, largest if step > largest else step, x[i])
