"""Indices chosen at random; see `reference.random_indices`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mpicomp.kernels.cpu.compiled import compiled
from mpicomp.kernels.reference import FEISTEL_ROUNDS

Array = npt.NDArray[Any]


@compiled
def _feistel(index: Any, seed: int, half: int) -> Any:
    """Return a bijection of ``[0, 4**half)``, keyed by 64 bits, of `index`."""
    mask = np.uint32((1 << half) - 1)
    left, right = np.uint32(index >> half), np.uint32(index) & mask
    for turn in range(FEISTEL_ROUNDS):
        key = np.uint32(((seed >> 16 * turn & 0xFFFF) | turn << 16) + 1)
        mixed = np.uint32((right + key) * np.uint32(0x9E3779B1))
        mixed = np.uint32((mixed ^ mixed >> np.uint32(15)) * np.uint32(0x2C1B3C6D))
        left, right = right, left ^ ((mixed ^ mixed >> np.uint32(12)) & mask)
    return np.uint32(left << np.uint32(half) | right)


@compiled
def random_indices(out: Array, seed: int, n: int, half: int) -> None:
    """Write the images of ``0 ... k - 1`` to `out` (k,), uint32, each walked on until it is below `n`."""
    for i in range(len(out)):
        image = _feistel(i, seed, half)
        while image >= n:
            image = _feistel(image, seed, half)
        out[i] = image
