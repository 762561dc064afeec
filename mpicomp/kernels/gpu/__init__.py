"""Versions for GPUs in Triton: those of `mpicomp.kernels.reference`, on contiguous float32 or float64.

The functions here take tensors and start what is in the other files, which they wait for only where they must know a
length. Results are those of the definitions on the CPU, bit for bit: torch's own on a GPU may be off in the
last bit where it divides by a number. In Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) they take
tensors in host memory, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpicomp.kernels.gpu import blocks, random, select, select_parts, update
from mpicomp.kernels.gpu import indices as codes
from mpicomp.kernels.gpu import quantize as quantizer
from mpicomp.kernels.gpu.compiled import BLOCK, launch, tiles
from mpicomp.kernels.reference import FEISTEL_ROUNDS, feistel_half, packed_nbytes, sqrt

_GROUPS = BLOCK // 8

_LONGEST_PART = 2**22
"""Entries up to which six passes over a vector are made rather than two and a wait; chosen, not measured on a GPU."""


def _plain(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Return `x`; ValueError unless it is contiguous, and of the type, length and device of `like`."""
    fits = like is None or (x.dtype == like.dtype and x.shape == like.shape and x.device == like.device)
    if not x.is_contiguous() or not fits:
        raise ValueError(
            f"a contiguous vector is needed, of the type, length and device of the others: this one has {x.dtype}, "
            f"shape {tuple(x.shape)}, strides {x.stride()}, on {x.device}"
        )
    return x


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k`; up to 4 million entries without a wait, where a NaN is larger than all numbers."""
    return _top_k(_plain(x), None, k)


def top_k_of_difference(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_difference`; the difference is not formed. Waits as `top_k` does."""
    return _top_k(_plain(x), _plain(y, x), k)


def _top_k(x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    if len(x) <= _LONGEST_PART or k == 0:
        return select_parts.top_k_of_parts(x, y, (len(x),), (k,))
    return select.top_k(x, y, k)


def top_k_of_parts(x: Tensor, y: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_parts`; as many launches for a hundred parts as for one, and no wait to find NaNs."""
    return select_parts.top_k_of_parts(_plain(x), None if y is None else _plain(y, x), sizes, counts)


def top_k_of_blocks(x: Tensor, y: Tensor | None, table: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_of_blocks`; one launch, and no wait to find NaNs."""
    return blocks.top_k_of_blocks(_plain(x), None if y is None else _plain(y, x), _plain(table), total)


def block_indices(packed: Tensor, table: Tensor, bits: int, total: int) -> Tensor:
    """See `reference.block_indices`; a place outside of its block becomes -1, which `scatter_add_` leaves out."""
    _check(packed, total, bits)
    return blocks.block_indices(_plain(packed), _plain(table), bits, total)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """See `reference.pack_codes`; for fewer than 16 bits."""
    return blocks.pack_codes(_plain(codes.to(torch.int16)), bits)


def above(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """See `reference.above`."""
    return select.above(_plain(x), None, threshold)


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """See `reference.scatter_add_`; leaves out an index that is out of range, as an error would have to wait for it."""
    if values.dtype != out.dtype or len(values) != len(indices):
        raise ValueError(
            f"{len(values)} values of {values.dtype} for {len(indices)} indices, to be added to {out.dtype}"
        )
    k = len(indices)
    launch(update.scatter_add, tiles(k), _plain(out), _plain(indices), _plain(values), weight, len(out), k, BLOCK=BLOCK)


def add_block_(out: Tensor, offset: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_block_`; leaves out what is out of range."""
    k = len(values)
    launch(update.add_block, tiles(k), _plain(out), offset, _plain(values), weight, len(out), k, BLOCK=BLOCK)


def encode_indices(indices: Tensor, n: int) -> Tensor:
    """See `reference.encode_indices`; there are zeros behind the code."""
    return codes.encode(_plain(indices), n)


def decode_indices(code: Tensor, k: int, n: int) -> Tensor:
    """See `reference.decode_indices`; does not wait to see whether the code is damaged."""
    return codes.decode(_plain(code), k, n)


def add_coded_(out: Tensor, code: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_coded_`."""
    scatter_add_(out, decode_indices(code, len(values), len(out)), values, weight)


def mix_(x: Tensor, s: Tensor, x_hat: Tensor, gamma: float) -> None:
    """See `reference.mix_`."""
    launch(update.mix, tiles(len(x)), _plain(x), _plain(s, x), _plain(x_hat, x), gamma, len(x), BLOCK=BLOCK)


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
    vectors = _plain(x), _plain(s, x), _plain(x_hat, x), _plain(v, x)
    numbers = gamma, beta, 1 - beta, correction, epsilon, clip
    launch(update.adaptive_mix, tiles(len(x)), *vectors, *numbers, len(x), BLOCK=BLOCK)


def mean_magnitude(x: Tensor) -> Tensor:
    """See `reference.mean_magnitude`; does not wait to see whether it is finite."""
    return _over(quantizer.total(_plain(x), square=False), max(1, len(x))).to(torch.float32)


def norm(x: Tensor, divisor: float = 1.0) -> Tensor:
    """See `reference.norm`; does not wait to see whether it is finite."""
    if x.dtype != torch.float64:
        return _over(sqrt(quantizer.total(_plain(x), square=True)), divisor)
    most = _plain(x).abs().max().reshape(1) if len(x) else x.new_zeros(1)
    scaled = x / most.masked_fill(most == 0, 1.0)
    return _over(most * sqrt(quantizer.total(scaled, square=True)), divisor)


def _over(x: Tensor, divisor: float) -> Tensor:
    """Return ``x / divisor``, rounded correctly: by a number, torch would multiply with its inverse on a GPU."""
    return x if divisor == 1 else x / torch.full_like(x, divisor)


def noise(x: Tensor, seed: int) -> Tensor:
    """See `reference.noise`."""
    out = torch.empty(len(x), dtype=torch.float32, device=x.device)
    launch(quantizer.noise, tiles(len(x)), out, *_halves(seed), len(x), BLOCK=BLOCK)
    return out


def random_indices(seed: Tensor, n: int, k: int) -> Tensor:
    """See `reference.random_indices`."""
    out = torch.empty(k, dtype=torch.int32, device=seed.device)
    launch(random.random_indices, tiles(k), out, seed, n, k, HALF=feistel_half(n), TURNS=FEISTEL_ROUNDS, BLOCK=BLOCK)
    return out


def _halves(seed: int) -> tuple[int, int]:
    """Return the halves of a seed as signed numbers of 32 bits; Triton would compile anew for larger ones."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def quantize(x: Tensor, unit: Tensor, bits: int, seed: int) -> Tensor:
    """See `reference.quantize`."""
    packed, groups = _room(x, bits + 1)
    launch(
        quantizer.quantize, tiles(len(x)), _plain(x), packed, unit, *_halves(seed), len(x), groups,
        BITS=bits, GROUPS=_GROUPS,
    )  # fmt: skip
    return packed


def add_quantized_(out: Tensor, packed: Tensor, bits: int, scale: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_quantized_`."""
    groups = _check(packed, len(out), bits + 1)
    arguments = _plain(out), _plain(packed), scale, weight, len(out), groups
    launch(quantizer.add_quantized, tiles(len(out)), *arguments, BITS=bits, GROUPS=_GROUPS)


def round_to_grid(x: Tensor, unit: Tensor, middles: Sequence[float], bits: int) -> Tensor:
    """See `reference.round_to_grid`."""
    packed, groups = _room(x, bits)
    bounds = _table(tuple(middles), x.dtype, x.device)
    arguments = _plain(x), packed, bounds, unit, len(bounds), len(x), groups
    launch(quantizer.round_to_grid, tiles(len(x)), *arguments, BITS=bits, GROUPS=_GROUPS)
    return packed


def add_gridded_(
    out: Tensor, packed: Tensor, grid: Sequence[float], bits: int, scale: Tensor, weight: float = 1.0
) -> None:
    """See `reference.add_gridded_`."""
    groups = _check(packed, len(out), bits)
    signed = [sign * value for value in grid for sign in (1, -1)]
    signed += [0.0] * ((1 << bits) - len(signed))  # for codes of no place, in a damaged message
    table = _table(tuple(signed), out.dtype, out.device)
    arguments = _plain(out), _plain(packed), table, scale, weight, len(out), groups
    launch(quantizer.add_gridded, tiles(len(out)), *arguments, BITS=bits, GROUPS=_GROUPS)


@functools.lru_cache(maxsize=64)
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers on the device; a copy from the host waits for it, and is made once."""
    return torch.tensor(values, dtype=dtype, device=device)


def pack_signs(x: Tensor) -> Tensor:
    """See `reference.pack_signs`."""
    packed, groups = _room(x, 1)
    launch(quantizer.pack_signs, tiles(len(x)), _plain(x), packed, len(x), groups, GROUPS=_GROUPS)
    return packed


def add_signs_(out: Tensor, packed: Tensor, scale: Tensor, weight: float = 1.0) -> None:
    """See `reference.add_signs_`."""
    groups = _check(packed, len(out), 1)
    arguments = _plain(out), _plain(packed), scale, weight, len(out), groups
    launch(quantizer.add_signs, tiles(len(out)), *arguments, GROUPS=_GROUPS)


def _room(x: Tensor, bits: int) -> tuple[Tensor, int]:
    """Return room for codes of so many `bits` for the entries of `x`, and the bytes of a bit plane."""
    return torch.empty(packed_nbytes(len(x), bits), dtype=torch.uint8, device=x.device), packed_nbytes(len(x), 1)


def _check(packed: Tensor, n: int, bits: int) -> int:
    """Return the bytes of a bit plane; ValueError unless `packed` holds `n` codes of so many `bits`."""
    if packed.dtype != torch.uint8 or len(packed) != packed_nbytes(n, bits):
        raise ValueError(f"{len(packed)} entries of {packed.dtype} for {n} codes of {bits} bits")
    return packed_nbytes(n, 1)
