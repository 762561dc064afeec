"""Versions compiled for the CPU by numba: those of `mpicomp.kernels.reference`, on contiguous float32 or float64.

The functions here take tensors; what they call takes arrays, in memory that the tensors share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpicomp.errors import DivergenceError
from mpicomp.kernels.cpu import blocks, random, select, update
from mpicomp.kernels.cpu import indices as codes
from mpicomp.kernels.cpu import quantize as quantizer
from mpicomp.kernels.reference import (
    DAMAGED,
    NAN,
    feistel_half,
    finite,
    index_code_nbytes,
    index_shift,
    number,
    packed_nbytes,
)


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


def top_k_of_parts(x: Tensor, y: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_parts`."""
    values, indices = torch.empty(sum(counts), dtype=x.dtype), torch.empty(sum(counts), dtype=torch.int32)
    vector, other, largest, places = _array(x), None if y is None else _array(y, x), values.numpy(), indices.numpy()
    start = done = 0
    for size, k in zip(sizes, counts, strict=True):
        part, chosen = slice(start, start + size), slice(done, done + k)
        difference = None if other is None else other[part]
        if not select.top_k(vector[part], difference, k, largest[chosen], places[chosen]):
            raise DivergenceError(NAN)
        places[chosen] += start
        start, done = start + size, done + k
    return values, indices


def top_k_of_blocks(x: Tensor, y: Tensor | None, table: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_blocks`; the difference is not formed."""
    values, places = torch.empty(total + 1, dtype=x.dtype), torch.empty(total + 1, dtype=torch.int16)
    other = None if y is None else _array(y, x)
    if not blocks.top_k_of_blocks(_array(x), other, _array(table), values.numpy(), places.numpy()):
        raise DivergenceError(NAN)
    return values[:total], places[:total]


def block_indices(packed: Tensor, table: Tensor, bits: int, total: int) -> Tensor:
    """See `reference.block_indices`."""
    indices = torch.empty(total, dtype=torch.int32)
    if not blocks.indices(_packed(packed, total, bits), _array(table), bits, indices.numpy()):
        raise IndexError(DAMAGED)
    return indices


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """See `reference.pack_codes`; for fewer than 16 bits."""
    packed = torch.empty(packed_nbytes(len(codes), bits), dtype=torch.uint8)
    blocks.pack(_array(codes.to(torch.int16)).view("u2"), bits, packed.numpy())
    return packed


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
        raise IndexError(DAMAGED)


def encode_indices(indices: Tensor, n: int) -> Tensor:
    """See `reference.encode_indices`."""
    k = len(indices)
    if not k:
        return torch.empty(0, dtype=torch.uint8)
    code = torch.empty(index_code_nbytes(n, k) + codes.SLACK, dtype=torch.uint8)
    return code[: codes.encode(_array(indices), index_shift(n, k), code.numpy())]


def decode_indices(code: Tensor, k: int, n: int) -> Tensor:
    """See `reference.decode_indices`."""
    indices = torch.empty(k, dtype=torch.int32)
    if not codes.decode(_array(code), index_shift(n, k), n, None, 0.0, indices.numpy(), k):
        raise IndexError(DAMAGED)
    return indices


def add_coded_(out: Tensor, code: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_coded_`; before a damaged index is met, others may have been added."""
    k, n = len(values), len(out)
    if values.dtype != out.dtype:
        raise ValueError(f"values of {values.dtype} cannot be added to {out.dtype}")
    if not codes.decode(_array(code), index_shift(n, k), n, _array(values), weight, _array(out), k):
        raise IndexError(DAMAGED)


def random_indices(seed: Tensor, n: int, k: int) -> Tensor:
    """See `reference.random_indices`."""
    indices = torch.empty(k, dtype=torch.int32)
    random.random_indices(indices.numpy().view("u4"), int(seed), n, feistel_half(n))
    return indices


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


def mean_magnitude(x: Tensor) -> Tensor:
    """See `reference.mean_magnitude`."""
    mean = finite(quantizer.total(_array(x), square=False)) / max(1, len(x))
    return number(mean, torch.float32, x.device)


def norm(x: Tensor, divisor: float = 1.0) -> Tensor:
    """See `reference.norm`."""
    array = _array(x)
    if x.dtype != torch.float64:
        length = finite(math.sqrt(quantizer.total(array, square=True)))
    else:
        largest = finite(float(np.abs(array).max(initial=0.0)))
        length = largest * math.sqrt(quantizer.total(array / largest, square=True)) if largest else 0.0
    return number(length / divisor, torch.float64, x.device)


def noise(x: Tensor, seed: int) -> Tensor:
    """See `reference.noise`."""
    out = torch.empty(len(x), dtype=torch.float32)
    quantizer.noise(out.numpy(), *_halves(seed))
    return out


def _halves(seed: int) -> tuple[np.uint32, np.uint32]:
    return np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32 & 0xFFFFFFFF)


def quantize(x: Tensor, unit: Tensor, bits: int, seed: int) -> Tensor:
    """See `reference.quantize`."""
    packed = torch.empty(packed_nbytes(len(x), bits + 1), dtype=torch.uint8)
    quantizer.quantize(_array(x), float(unit), bits, *_halves(seed), packed.numpy())
    return packed


def add_quantized_(out: Tensor, packed: Tensor, bits: int, scale: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_quantized_`."""
    quantizer.add_quantized(_array(out), _packed(packed, len(out), bits + 1), bits, weight * float(scale))


def round_to_grid(x: Tensor, unit: Tensor, middles: Sequence[float], bits: int) -> Tensor:
    """See `reference.round_to_grid`."""
    packed = torch.empty(packed_nbytes(len(x), bits), dtype=torch.uint8)
    entries = _array(x)
    quantizer.round_to_grid(entries, float(unit), np.array(middles, entries.dtype), bits, packed.numpy())
    return packed


def add_gridded_(
    out: Tensor, packed: Tensor, grid: Sequence[float], bits: int, scale: Tensor, weight: float = 1.0
) -> None:
    """See `reference.add_gridded_`."""
    entries = _array(out)
    table = np.zeros(1 << bits, entries.dtype)
    table[: 2 * len(grid)] = [sign * value for value in grid for sign in (1, -1)]
    quantizer.add_gridded(entries, _packed(packed, len(out), bits), table, bits, weight * float(scale))


def pack_signs(x: Tensor) -> Tensor:
    """See `reference.pack_signs`."""
    packed = torch.empty(packed_nbytes(len(x), 1), dtype=torch.uint8)
    quantizer.pack_signs(_array(x), packed.numpy())
    return packed


def add_signs_(out: Tensor, packed: Tensor, scale: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_signs_`."""
    quantizer.add_signs(_array(out), _packed(packed, len(out), 1), weight * float(scale))


def _packed(packed: Tensor, n: int, bits: int) -> npt.NDArray[Any]:
    """Return `packed` as an array; ValueError unless it holds `n` codes of so many `bits`."""
    if packed.dtype != torch.uint8 or len(packed) != packed_nbytes(n, bits):
        raise ValueError(f"{len(packed)} entries of {packed.dtype} for {n} codes of {bits} bits")
    return _array(packed)
