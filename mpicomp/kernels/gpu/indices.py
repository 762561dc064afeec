"""The Rice code of ascending indices; see `reference.encode_indices`.

encode   end_i = sum over j <= i of (gap_j >> shift) + i, by torch's cumsum; bit end_i of the second stream is set
decode   end_i = the place of the i-th bit set, found as entries are in `select`;
         index_i = sum over j <= i of ((end_j - end_{j-1} - 1 << shift) + low_j + 1) - 1, by torch's cumsum
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.language import tensor

from mpicomp.kernels.gpu.compiled import BLOCK, jit, launch, offsets, tiles
from mpicomp.kernels.gpu.pack import load_codes, matrix, store_codes
from mpicomp.kernels.reference import DAMAGED, index_code_nbytes, index_shift, packed_nbytes

_GROUPS = BLOCK // 8
_WORD = 4


def encode(indices: Tensor, n: int) -> Tensor:
    """Return the code of `indices` (k,) int32 below `n`, and zeros behind it; see `reference.trim_code`."""
    k = len(indices)
    shift = index_shift(n, k)
    planes = packed_nbytes(k, shift)
    skipped = -planes % _WORD  # atomics want words where the second stream begins
    room = skipped + planes + tiles(index_code_nbytes(n, k) - planes, _WORD) * _WORD
    code = torch.zeros(room, dtype=torch.uint8, device=indices.device)
    steps = torch.empty(k, dtype=torch.int32, device=indices.device)
    groups = packed_nbytes(k, 1)
    launch(_split, tiles(k), indices, code[skipped:], steps, k, groups, SHIFT=shift, GROUPS=_GROUPS)
    ends = steps.cumsum(0)
    words = code[skipped + planes :].view(torch.int32)
    launch(_set_bits, tiles(k), ends, words, k, BLOCK=BLOCK)
    return code[skipped : skipped + index_code_nbytes(n, k)]


def decode(code: Tensor, k: int, n: int) -> Tensor:
    """Return the `k` indices below `n` of a `code`, int32; any, if it is damaged, IndexError if it is too short."""
    shift = index_shift(n, k)
    planes = packed_nbytes(k, shift)
    stream = code[planes:]
    nbytes = len(stream)
    if k and not nbytes:
        raise IndexError(DAMAGED)
    counts = torch.zeros(max(1, tiles(8 * nbytes)), dtype=torch.int32, device=code.device)
    launch(_count_bits, tiles(8 * nbytes), stream, counts, nbytes, GROUPS=_GROUPS)
    found = counts.cumsum(0)
    ends = torch.zeros(k, dtype=torch.int32, device=code.device)
    launch(_find_bits, tiles(8 * nbytes), stream, found, ends, nbytes, k, GROUPS=_GROUPS)
    steps = torch.empty(k, dtype=torch.int32, device=code.device)
    launch(_join, tiles(k), code, ends, steps, k, packed_nbytes(k, 1), SHIFT=shift, GROUPS=_GROUPS)
    return steps.cumsum(0).int()


@jit
def _split(
    indices: tensor,
    code: tensor,
    steps: tensor,
    k: tensor,
    groups: tensor,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Write the low bits of the gaps, plane after plane, and one more than the rest."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    before = tl.load(indices + i - 1, mask=(i > 0) & (i < k), other=-1)
    gap = tl.load(indices + i, mask=i < k, other=0) - before - 1
    tl.store(steps + i, (gap >> SHIFT) + 1, mask=i < k)
    store_codes(code, tl.where(i < k, gap & ((1 << SHIFT) - 1), 0), group, groups, SHIFT)


@jit
def _set_bits(ends: tensor, words: tensor, k: tensor, BLOCK: tl.constexpr) -> None:
    """Set the bit before each end; bits of one word may be set by several threads, in any order."""
    i = offsets(tl.program_id(0), BLOCK)
    end = tl.load(ends + i, mask=i < k, other=1) - 1
    bit = tl.full((BLOCK,), 1, tl.int32) << (end & 31).to(tl.int32)
    tl.atomic_or(words + (end >> 5), bit, mask=i < k, sem="relaxed")


@jit
def _bits(stream: tensor, group: tensor, nbytes: tensor) -> tensor:
    """Return the bits of bytes as rows of 8."""
    byte = tl.load(stream + group, mask=group < nbytes, other=0).to(tl.int32)
    return (byte[:, None] >> tl.arange(0, 8)[None, :]) & 1


@jit
def _count_bits(stream: tensor, counts: tensor, nbytes: tensor, GROUPS: tl.constexpr) -> None:
    """Count the bits that are set in each tile."""
    group = offsets(tl.program_id(0), GROUPS)
    tl.store(counts + tl.program_id(0), tl.sum(tl.sum(_bits(stream, group, nbytes), axis=1), axis=0))


@jit
def _find_bits(stream: tensor, found: tensor, ends: tensor, nbytes: tensor, k: tensor, GROUPS: tl.constexpr) -> None:
    """Write the places of the first `k` bits that are set."""
    tile = tl.program_id(0)
    group = offsets(tile, GROUPS)
    bits = tl.reshape(_bits(stream, group, nbytes), (GROUPS * 8,))
    place = tl.load(found + tile - 1, mask=tile > 0, other=0) + tl.cumsum(bits) - 1
    tl.store(ends + place, offsets(tile, GROUPS * 8), mask=(bits == 1) & (place < k))


@jit
def _join(
    code: tensor,
    ends: tensor,
    steps: tensor,
    k: tensor,
    groups: tensor,
    SHIFT: tl.constexpr,
    GROUPS: tl.constexpr,
) -> None:
    """Write the first index, and for the others what comes on top of the one before."""
    group = offsets(tl.program_id(0), GROUPS)
    i = matrix(group)
    before = tl.load(ends + i - 1, mask=(i > 0) & (i < k), other=-1)
    high = (tl.load(ends + i, mask=i < k, other=0) - before - 1).to(tl.int64)
    step = (high << SHIFT) + load_codes(code, group, groups, SHIFT, GROUPS) + (i > 0).to(tl.int64)
    tl.store(steps + i, tl.minimum(step, 0x7FFFFFFF).to(tl.int32), mask=i < k)  # of a damaged code it may be more
