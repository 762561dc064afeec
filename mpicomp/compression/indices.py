"""How ascending indices travel: as numbers of 2 or 4 bytes, or, where that is shorter, as a Rice code of their gaps.

A code of k of n indices takes about ``log2(n / k) + 1.5`` bits each: 8.1 bits at 1 %, 4.8 at 10 %. That is within
1.5 % of the entropy of a random choice where 0.1 % to 10 % are kept, and less where they lie in clusters. From about
35 % on it is the bitmap. Its length varies; n and k, which both ends know, say which of the two is sent, and how long
it can be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.message import Field, Payload, index_dtype
from mpicomp.kernels.reference import index_code_nbytes, index_shift
from mpicomp.timing import traced

_COUNT = 4 + 3
"""Bytes that a field of variable length may take beyond its content: its count, and the gap before it."""


def index_field(n: int, k: int) -> Field:
    """Return the field ``indices`` for `k` of `n`."""
    plain = Field("indices", index_dtype(n), k)
    longest = index_code_nbytes(n, k)
    if longest + _COUNT < k * plain.dtype.itemsize:
        return Field("indices", torch.uint8, longest, variable=True, code_of=n)
    return plain


def any_index_field(n: int) -> Field:
    """Return the field ``indices``, a code, long enough for any number of indices below `n`."""
    index_dtype(n)  # raises an error if they have more than 32 bits
    # For one shift the code of more indices is the longer one, so look at the largest k of each.
    most = (n if shift == 0 else n * 493 // (1024 << shift - 1) for shift in range(index_shift(n, 1) + 1))
    longest = max((index_code_nbytes(n, k) for k in most), default=0)
    return Field("indices", torch.uint8, longest, variable=True, code_of=n)


@traced("encode")
def write_indices(indices: Tensor, n: int, field: Field) -> Payload:
    """Return ascending `indices` (k,) int32 below `n` as `field` holds them.

    On a device a code has them beside it as they are, ``decoded``, which is not sent: there it takes several launches
    to decode the own message, and the compiled version for the CPU does it while it adds.
    """
    if field.dtype != torch.uint8:
        return {"indices": indices.to(field.dtype)}
    code = kernels.encode_indices(indices, n)
    return {"indices": code} if code.is_cpu else {"indices": code, "decoded": indices}


def scatter_add_(out: Tensor, payload: Payload, values: Tensor, weight: float) -> None:
    """Compute ``out[indices] += weight * values``, with the indices of `payload` as they were written.

    Raises:
        IndexError: damaged indices.

    """
    indices = payload.get("decoded", payload["indices"])
    if indices.dtype == torch.uint8:
        kernels.add_coded_(out, indices, values, weight)
    else:
        kernels.scatter_add_(out, indices, values, weight)
