"""Versions compiled for the CPU by numba: those of `mpicomp.kernels.reference`, on contiguous float32 or float64.

The functions here take tensors; what they call takes arrays, in memory that the tensors share.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.errors import DivergenceError
from mpicomp.kernels.cpu import select, update
from mpicomp.kernels.reference import NAN


def _array(x: Tensor, like: Tensor | None = None) -> npt.NDArray[Any]:
    """Return `x` as an array; ValueError unless it is contiguous, and of the type and length of `like`."""
    if not x.is_contiguous() or (like is not None and (x.dtype != like.dtype or x.shape != like.shape)):
        raise ValueError(
            f"a contiguous vector is needed, of the type and length of the others: this one has {x.dtype}, shape "
            f"{tuple(x.shape)}, strides {x.stride()}"
        )
    array: npt.NDArray[Any] = x.detach().numpy()
    return array


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k`."""
    return _top_k(x, None, k)


def top_k_of_difference(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_difference`; the difference is not formed."""
    return _top_k(x, _array(y, x), k)


def _top_k(x: Tensor, y: npt.NDArray[Any] | None, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.empty(k, dtype=x.dtype), torch.empty(k, dtype=torch.int32)
    if not select.top_k(_array(x), y, k, values.numpy(), indices.numpy()):
        raise DivergenceError(NAN)
    return values, indices


def above(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """See `reference.above`."""
    found = select.above(_array(x), threshold)
    if found is None:
        raise DivergenceError(NAN)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """See `reference.scatter_add_`."""
    places = _array(indices)
    if values.dtype != out.dtype or len(values) != len(indices):
        raise ValueError(
            f"{len(values)} values of {values.dtype} for {len(indices)} indices, to be added to {out.dtype}"
        )
    if not update.scatter_add(_array(out), places.view(f"u{places.itemsize}"), _array(values), weight):
        raise IndexError(f"an index beyond the {len(out)} entries of the vector")


def mix_(x: Tensor, s: Tensor, x_hat: Tensor, gamma: float) -> None:
    """See `reference.mix_`."""
    update.mix(_array(x), _array(s, x), _array(x_hat, x), gamma)


def adaptive_mix_(
    x: Tensor,
    s: Tensor,
    x_hat: Tensor,
    v: Tensor,
    gamma: float,
    beta: float,
    correction: float,
    epsilon: float,
    clip: float,
) -> None:
    """See `reference.adaptive_mix_`."""
    update.adaptive_mix(_array(x), _array(s, x), _array(x_hat, x), _array(v, x), gamma, beta, correction, epsilon, clip)
