"""The definition of every operation in plain torch; faster versions are tested against these.

One function for each operation, on flat tensors; kernels know nothing about messages, ranks or states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mpicomp.errors import DivergenceError

NAN = "NaN among the values to be compressed"
NOT_FINITE = "NaN or infinity among the values to be compressed"

FEISTEL_ROUNDS = 4
DAMAGED = "the indices of a message do not fit the vector: it is damaged, or its sender has another model"

_BLOCK = 2**16  # entries that stay in the cache
_FOLD = 2**10  # entries that are summed by folding
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)
_MASK = 2**32 - 1
_ODD = 0x9E3779B1  # 2**32 / golden ratio, odd: a bijection modulo powers of two


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values (k,) and indices (k,) int32, ascending, of the `k` entries of `x` (n,) largest in magnitude.

    Ties go to the lowest index, so that all devices choose the same. `k` is in ``[0, n]``.

    Raises:
        DivergenceError: `x` has a NaN, which cannot be ordered. Where that would have to wait for a device, a NaN is
            larger than all numbers, and who sends the values raises the error.

    """
    magnitude = _magnitude(x)
    if k == 0:
        return x[:0].clone(), torch.empty(0, dtype=torch.int32, device=x.device)
    threshold = magnitude.kthvalue(len(x) - k + 1).values if x.is_cuda else _kth_largest(magnitude, k)
    larger = (magnitude > threshold).nonzero().flatten().int()
    ties = (magnitude == threshold).nonzero().flatten()[: k - len(larger)].int()
    indices = torch.cat([larger, ties]).sort().values
    return x[indices], indices


def top_k_of_difference(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return `top_k` of ``x - y``."""
    return top_k(x - y, k)


def top_k_of_parts(x: Tensor, y: Tensor | None, sizes: Sequence[int], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return values and indices in `x` (n,) of the ``counts[p]`` largest entries of each of its consecutive parts.

    These are the results of `top_k` for each part, concatenated; with `y` (n,), those of ``x - y``. The `sizes` of the
    parts sum to n.

    Raises:
        DivergenceError: there is a NaN, even in a part whose count is 0; or as of `top_k`.

    """
    values, indices = [x[:0]], [torch.empty(0, dtype=torch.int32, device=x.device)]
    start = 0
    for size, k in zip(sizes, counts, strict=True):
        part = slice(start, start + size)
        largest, places = top_k(x[part] if y is None else x[part] - y[part], k)
        values.append(largest)
        indices.append(places + start)
        start += size
    return torch.cat(values), torch.cat(indices)


LARGEST_BLOCK = 2**12
"""Entries of the largest block of `top_k_of_blocks`: 64 x 64, as of SparseLoCo and DeMo."""


def top_k_of_blocks(x: Tensor, y: Tensor | None, table: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return values (total,) and places (total,) int16 in its block of the largest entries of each block of `x` (n,).

    With `y` (n,), of ``x - y``. Blocks follow one another, and places ascend in each; ties go to the lowest place.

    `table` (blocks, 6) int64 says of each block: ``start``, its first entry in the vector; ``width``, the entries in a
    row; ``stride``, from one row to the next; ``size``, of all rows; ``count``, how many are kept, at least one; and
    ``first``, how many are kept of the blocks before. Entry ``place`` of a block has the index
    ``start + place // width * stride + place % width``.

    Raises:
        DivergenceError: a NaN in a block; or as of `top_k`.

    """
    values, places = x.new_empty(total), torch.empty(total, dtype=torch.int16, device=x.device)
    if not len(table):
        return values, places
    kinds, kind_of = torch.unique(table[:, 1:5], dim=0, return_inverse=True)
    for i, (width, stride, size, k) in enumerate(kinds.tolist()):
        blocks = table[kind_of == i]
        place = torch.arange(size, device=x.device)
        at = blocks[:, :1] + place // width * stride + place % width
        entries = x[at] if y is None else x[at] - y[at]
        order = _magnitude(entries).sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, :k].sort(dim=1).values
        out = blocks[:, 5:] + torch.arange(k, device=x.device)
        values[out] = entries.gather(1, chosen)
        places[out] = chosen.to(torch.int16)
    return values, places


def block_indices(packed: Tensor, table: Tensor, bits: int, total: int) -> Tensor:
    """Return the indices in the vector, int32 (total,), of places that `pack_codes` has packed; see `top_k_of_blocks`.

    Raises:
        IndexError: a place is outside of its block, as of a damaged message.

    """
    place = unpack_codes(packed, bits, total).long()
    start, width, stride, size = table[:, :4].repeat_interleave(table[:, 4], dim=0, output_size=total).T
    if bool((place >= size).any()):
        raise IndexError(DAMAGED)
    indices: Tensor = start + place // width * stride + place % width
    return indices.int()


def above(x: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return values and indices, int32 and ascending, of the entries of `x` (n,) with ``|x_i| >= threshold``.

    Raises:
        DivergenceError: a NaN in `x`, which is below every threshold.

    """
    indices = (_magnitude(x) >= threshold).nonzero().flatten().int()
    return x[indices], indices


def _magnitude(x: Tensor) -> Tensor:
    """Return |x|; raise DivergenceError if there is a NaN."""
    magnitude = x.abs()
    if bool(magnitude.isnan().any()):
        raise DivergenceError(NAN)
    return magnitude


def _kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """Return the k-th largest entry of `magnitude` (n,); NumPy's selection is several times faster than torch's."""
    values = magnitude if magnitude.dtype in (torch.float32, torch.float64) else magnitude.float()
    numpy = values.numpy()
    position = len(numpy) - k
    return torch.tensor(np.partition(numpy, position)[position], dtype=magnitude.dtype)


def scatter_add_(out: Tensor, indices: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """Compute ``out[indices] += weight * values`` for distinct indices (k,), int32, or int16 modulo 2**16."""
    out.index_add_(
        0, indices.to(torch.int32) & 0xFFFF if indices.dtype == torch.int16 else indices, values, alpha=weight
    )


def add_block_(out: Tensor, offset: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """Add ``weight * values`` to the entries of `out` from `offset` (1,) on, int32, which is on the device of `out`."""
    start = int(offset)
    out[start : start + len(values)].add_(values, alpha=weight)


def mix_(x: Tensor, s: Tensor, x_hat: Tensor, gamma: float) -> None:
    """Compute ``x += gamma (s - x_hat)``, all (n,)."""
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        x[block].add_(s[block] - x_hat[block], alpha=gamma)


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
    """Mix with a step for each entry, all (n,).

    r = s - x_hat;  v = beta v + (1 - beta) r r;  x += min(gamma / (sqrt(v / correction) + epsilon), clip) r
    """
    for start in range(0, len(x), _BLOCK):
        block = slice(start, start + _BLOCK)
        r = s[block] - x_hat[block]
        second = v[block].mul_(beta).addcmul_(r, r, value=1 - beta)
        step = gamma / sqrt(second / correction).add_(epsilon)
        x[block].addcmul_(r, step.clamp_max_(clip))


def sqrt(x: Tensor) -> Tensor:
    """Return the root, rounded correctly; torch's on the CPU may come from a library that is off in the last bit."""
    if x.is_cpu and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.sqrt(x.numpy()))
    return x.sqrt()


def index_shift(n: int, k: int) -> int:
    """Return how many low bits of the gaps between `k` of `n` indices `encode_indices` splits off.

    The best whole number for gaps of geometric distribution (Kiely 2004, IPN Progress Report 42-159), in integers, so
    that all machines agree; 0 makes the code a bitmap.
    """
    return (n * 493 // (k * 1024)).bit_length() if k else 0


def index_code_nbytes(n: int, k: int) -> int:
    """Return the bytes of the longest code of `k` of `n` indices."""
    shift = index_shift(n, k)
    return packed_nbytes(k, shift) + -(-(k + (n - k >> shift)) // 8) if k else 0


def encode_indices(indices: Tensor, n: int) -> Tensor:
    """Return ascending, different `indices` (k,) int32 below `n` as bytes, uint8: a Rice code in two streams.

    ``gap_i = index_i - index_{i-1} - 1`` is cut into its `index_shift` low bits, packed by `pack_codes`, and the rest
    q, which is q zeros and a one in the second stream. Expected bits are within 1.5 % of the entropy of a random choice
    for k/n from 0.1 % to 10 %. On a device, which alone knows its length, the code may have zeros behind it, up to
    `index_code_nbytes`; `trim_code` removes them.
    """
    if not len(indices):
        return torch.empty(0, dtype=torch.uint8, device=indices.device)
    shift = index_shift(n, len(indices))
    gaps = torch.diff(indices, prepend=indices.new_full((1,), -1)) - 1
    ends = ((gaps >> shift) + 1).cumsum(0) - 1
    ones = torch.zeros(int(ends[-1]) + 1, dtype=torch.bool, device=indices.device)
    ones[ends] = True
    return torch.cat([pack_codes(gaps & (1 << shift) - 1, shift), pack_bits(ones)])


def decode_indices(code: Tensor, k: int, n: int) -> Tensor:
    """Return the `k` indices, int32, from a `code` of `encode_indices`.

    Raises:
        IndexError: the code is damaged. Where that would have to wait for a device, the indices may be any, and who
            receives the code calls `check_code`.

    """
    shift = index_shift(n, k)
    nbytes = packed_nbytes(k, shift)
    ends = unpack_bits(code[nbytes:], 8 * max(0, len(code) - nbytes)).nonzero().flatten()
    if len(ends) != k:
        raise IndexError(DAMAGED)
    low = unpack_codes(code[:nbytes], shift, k)
    high = torch.diff(ends, prepend=ends.new_full((1,), -1)) - 1
    indices = ((high << shift | low) + 1).cumsum(0) - 1
    if k and int(indices[-1]) >= n:
        raise IndexError(DAMAGED)
    return indices.int()


def trim_code(code: Tensor) -> Tensor:
    """Return a `code` of indices without the zeros that a device leaves behind it; waits for the device."""
    return code[: len(bytes(code.cpu().numpy()).rstrip(b"\0"))]  # the last byte of a code has the bit of its last index


def check_code(code: Tensor, k: int, n: int) -> None:
    """Raise IndexError unless a `code`, in host memory, has `k` indices, the last of them below `n`."""
    shift, planes = index_shift(n, k), packed_nbytes(k, index_shift(n, k))
    stream = bytes(code[planes:].numpy()).rstrip(b"\0")
    ones = _ONES[code.numpy()]
    if int(ones[planes:].sum()) != k:
        raise IndexError(DAMAGED)
    low = sum(int(plane.sum()) << i for i, plane in enumerate(ones[:planes].reshape(shift, -1))) if shift else 0
    if k and (8 * len(stream) - 9 + stream[-1].bit_length() + 1 - k << shift) + low + k > n:
        raise IndexError(DAMAGED)


def add_coded_(out: Tensor, code: Tensor, values: Tensor, weight: float = 1.0) -> None:
    """Compute ``out[indices] += weight * values`` for the indices in `code`; raise IndexError if it is damaged."""
    scatter_add_(out, decode_indices(code, len(values), len(out)), values, weight)


def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `value` as a tensor (1,) of `dtype`; made on the device, as a copy from the host would wait for it."""
    wide = torch.float64 if dtype.is_floating_point else dtype  # from which 1e300 becomes an infinity of float32
    return torch.full((1,), value, dtype=wide, device=device).to(dtype)


def mean_magnitude(x: Tensor) -> Tensor:
    """Return ``sum |x_i| / n`` of `x` (n,), float32 (1,), summed in float64 in an order that is equal on every device.

    Raises:
        DivergenceError: a NaN or an infinity in `x`. Where that would have to wait for a device, the result is not
            finite, and who sends it raises the error.

    """
    return number(finite(_sum(x, torch.abs)) / max(1, len(x)), torch.float32, x.device)


def norm(x: Tensor, divisor: float = 1.0) -> Tensor:
    """Return the Euclidean norm of `x` (n,) over `divisor`, float64 (1,), summed in an order equal on every device.

    Raises:
        DivergenceError: as of `mean_magnitude`.

    """
    if x.dtype != torch.float64:  # the squares of float32 neither overflow nor vanish in float64
        length = finite(math.sqrt(_sum(x, torch.square)))
    else:
        most = float(largest(x))
        length = most * math.sqrt(_sum(x / most, torch.square)) if most else 0.0
    return number(length / divisor, torch.float64, x.device)


def largest(x: Tensor) -> Tensor:
    """Return the largest magnitude in `x` (n,), in its type (1,).

    Raises:
        DivergenceError: as of `mean_magnitude`.

    """
    found = x.abs().max().reshape(1) if len(x) else x.new_zeros(1)
    if x.is_cpu:
        finite(float(found))
    return found


def finite(total: float) -> float:
    """Return `total`; raise DivergenceError if it is NaN or infinite."""
    if not math.isfinite(total):
        raise DivergenceError(NOT_FINITE)
    return total


def _sum(x: Tensor, function: Callable[[Tensor], Tensor]) -> float:
    """Return the sum of ``function(x)`` >= 0: sum blocks of 2**10, then their sums, until one is left."""
    sums = [_folded(function(part.double())) for part in torch.split(x, _FOLD * 2**8)]
    while (total := torch.cat([*sums, x.new_zeros(0, dtype=torch.float64)])).numel() > 1:
        sums = [_folded(total)]
    return float(total) if total.numel() else 0.0


def _folded(x: Tensor) -> Tensor:
    """Return the sums of the blocks of `x`, the second half of each added to the first until one entry is left."""
    sums = torch.nn.functional.pad(x, (0, -len(x) % _FOLD)).view(-1, _FOLD)
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums.flatten()


def noise(x: Tensor, seed: int) -> Tensor:
    """Return noise in ``[0, 1)`` of the length and device of `x`, float32, the same on every device.

    Entry i is a hash of i and the 64 bits of `seed`: the finalizer of MurmurHash3 (Appleby 2011), keyed in its middle.
    """
    bounds = [(start, min(start + _BLOCK, len(x))) for start in range(0, len(x), _BLOCK)]
    return torch.cat([_noise(seed, 0, 0, x.device), *(_noise(seed, *bound, x.device) for bound in bounds)])


def _noise(seed: int, start: int, stop: int, device: torch.device) -> Tensor:
    word = torch.arange(start, stop, dtype=torch.int64, device=device) * _ODD + (seed & _MASK) & _MASK
    word = (word ^ word >> 16) * 0x85EBCA6B & _MASK
    word ^= seed >> 32 & _MASK
    word = (word ^ word >> 13) * 0xC2B2AE35 & _MASK
    return ((word ^ word >> 16) >> 8).to(torch.float32) * 2.0**-24


def quantize(x: Tensor, unit: Tensor, bits: int, seed: int) -> Tensor:
    """Return `x` (n,) in units of `unit` (1,), rounded at random, at most ``2**bits - 1`` of them, as `pack_codes`.

    A code is twice the level plus one if x is negative, of ``bits + 1`` bits; a unit of 0, or one that is 0 in the type
    of `x`, makes all levels 0.
    """
    size = float(unit.to(x.dtype if x.dtype == torch.float64 else torch.float32)) or math.inf
    codes = []
    for start in range(0, len(x), _BLOCK):
        part = x[start : start + _BLOCK]
        wide = part if part.dtype == torch.float64 else part.float()
        level = (wide.abs() / size + _noise(seed, start, start + len(part), x.device)).floor_()
        codes.append(level.clamp_(max=2**bits - 1).to(torch.int16) << 1 | (part < 0))
    return pack_codes(torch.cat([*codes, torch.empty(0, dtype=torch.int16, device=x.device)]), bits + 1)


def add_quantized_(out: Tensor, packed: Tensor, bits: int, scale: Tensor, weight: float = 1.0) -> None:
    """Compute ``out += weight * scale * levels`` for the levels, with their signs, that `quantize` has packed.

    `scale` (1,) is on the device of `out`, as in a message; its product with `weight` is formed in float64.
    """
    step = weight * float(scale)
    for start in range(0, len(out), _BLOCK):
        stop = min(len(out), start + _BLOCK)
        codes = unpack_codes(packed, bits + 1, len(out), start, stop)
        signed = (codes >> 1) * (1 - 2 * (codes & 1))
        out[start:stop].add_(signed.to(out.dtype), alpha=step)


def round_to_grid(x: Tensor, unit: Tensor, middles: Sequence[float], bits: int) -> Tensor:
    """Return the places of ``|x_i| / unit`` among ascending `middles`, with the signs, as `pack_codes` of `bits` bits.

    `unit` is (1,), on the device of `x`. A code is twice the number of middles that are not larger, plus one if x is
    negative. A unit of 0, or one that is 0 in the type of `x`, makes all places 0. The middles must be exact in the
    type of `x`, and above zero.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = float(unit.to(wide)) or math.inf
    bounds = torch.tensor(middles, dtype=wide, device=x.device)
    codes = []
    for start in range(0, len(x), _BLOCK):
        part = x[start : start + _BLOCK]
        places = torch.bucketize(part.to(wide).abs() / size, bounds, right=True)
        codes.append(places.to(torch.int16) << 1 | (part < 0))
    return pack_codes(torch.cat([*codes, torch.empty(0, dtype=torch.int16, device=x.device)]), bits)


def add_gridded_(
    out: Tensor, packed: Tensor, grid: Sequence[float], bits: int, scale: Tensor, weight: float = 1.0
) -> None:
    """Compute ``out += weight * scale * grid[place]``, with its sign, for what `round_to_grid` has packed."""
    step = weight * float(scale)
    signed = [sign * value for value in grid for sign in (1, -1)]
    table = torch.tensor(signed, dtype=out.dtype, device=out.device)
    for start in range(0, len(out), _BLOCK):
        stop = min(len(out), start + _BLOCK)
        codes = unpack_codes(packed, bits, len(out), start, stop)
        out[start:stop].add_(table[codes.int()], alpha=step)


def pack_signs(x: Tensor) -> Tensor:
    """Return ``x >= 0`` (n,) as `pack_bits`."""
    return pack_bits(x >= 0)


def add_signs_(out: Tensor, packed: Tensor, scale: Tensor, weight: float = 1.0) -> None:
    """Compute ``out += weight * scale`` where a bit of `packed` is set, ``out -= weight * scale`` elsewhere."""
    step = weight * float(scale)
    for start in range(0, len(out), _BLOCK):
        stop = min(len(out), start + _BLOCK)
        signs = unpack_bits(packed, len(out), start, stop).to(out.dtype).mul_(2).sub_(1)
        out[start:stop].add_(signs, alpha=step)


def pack_bits(bits: Tensor) -> Tensor:
    """Return booleans (n,) as bytes (ceil(n / 8),) uint8, the first in the lowest bit."""
    return pack_codes(bits.to(torch.uint8), 1)


def unpack_bits(packed: Tensor, n: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Return booleans `start` to `stop` of the `n` in `packed`; undoes `pack_bits`. See `unpack_codes`."""
    return unpack_codes(packed, 1, n, start, stop).bool()


def packed_nbytes(n: int, bits: int) -> int:
    """Return the bytes of `n` codes of `bits` bits each."""
    return -(-n // 8) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (n,) int in ``[0, 2**bits)`` as bytes (ceil(n / 8) * bits,) uint8: bit plane after bit plane.

    Byte ``plane * ceil(n / 8) + j`` holds bit `plane` of codes ``8 j ... 8 j + 7``, the first in the lowest bit. Planes
    keep every byte within one pass over contiguous memory for any number of bits, also for 3, 5 or 7.
    """
    groups = -(-len(codes) // 8)
    wide = codes.to(torch.int16 if bits < 16 else torch.int32)
    padded = torch.nn.functional.pad(wide, (0, 8 * groups - len(codes))).view(groups, 8)
    places = torch.arange(8, dtype=padded.dtype, device=codes.device)
    packed = torch.empty(bits, groups, dtype=torch.uint8, device=codes.device)
    for plane in range(bits):
        packed[plane] = ((padded >> plane & 1) << places).sum(dim=1, dtype=torch.uint8)
    return packed.flatten()


def unpack_codes(packed: Tensor, bits: int, n: int, start: int = 0, stop: int | None = None) -> Tensor:
    """Return codes `start` (a multiple of 8) to `stop` of the `n` in `packed`; undoes `pack_codes`.

    They are int16, or int32 from 16 bits on.
    """
    dtype = torch.int16 if bits < 16 else torch.int32
    stop = n if stop is None else stop
    planes = packed.view(bits, -(-n // 8))[:, start // 8 : -(-stop // 8)]
    codes = torch.zeros(planes.shape[1], 8, dtype=dtype, device=packed.device)
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for plane in range(bits):
        codes |= (planes[plane, :, None] >> places & 1).to(dtype) << plane
    return codes.flatten()[: stop - start]


def random_indices(seed: Tensor, n: int, k: int) -> Tensor:
    """Return `k` different indices below `n`, int32 (k,), the same on every device, in time proportional to `k`.

    They are on the device of `seed` (1,), int64 >= 0. Entry i is the image of i under a permutation of ``[0, n)`` that
    the seed keys: a Feistel network on the smallest domain ``4**h >= n``, walked on until the image is below `n` (Black
    and Rogaway 2002, doi 10.1007/3-540-45760-7_9).
    """
    half, keys = feistel_half(n), _feistel_keys(int(seed))
    index = torch.arange(k, dtype=torch.int64, device=seed.device)
    image = _feistel(index, keys, half)
    while bool((outside := image >= n).any()):
        image[outside] = _feistel(image[outside], keys, half)
    return image.int()


def feistel_half(n: int) -> int:
    """Return the least h >= 1 with ``4**h >= n``."""
    half = 1
    while 4**half < n:
        half += 1
    return half


def _feistel_keys(seed: int) -> list[int]:
    """Return a key below ``2**18 + 1`` for each turn."""
    return [((seed >> 16 * turn) & 0xFFFF | turn << 16) + 1 for turn in range(FEISTEL_ROUNDS)]


def _feistel(index: Tensor, keys: list[int], half: int) -> Tensor:
    """Return a bijection of ``[0, 4**half)``, keyed, of `index`."""
    mask = 2**half - 1
    left, right = index >> half, index & mask
    for key in keys:
        mixed = (right + key) * _ODD & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
        left, right = right, left ^ (mixed ^ mixed >> 12) & mask
    image: Tensor = left << half | right
    return image
