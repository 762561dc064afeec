"""Fast versions of single operations on flat tensors: one function an operation, the same signature in each version.

`reference` is the definition, in plain torch on any device. The functions here look at the tensor's device and call
the fastest version of it; all versions give the same bits.
"""

from __future__ import annotations

from torch import Tensor

from mpicomp.kernels import cpu, reference
from mpicomp.kernels.reference import (
    clipped_cast,
    decode_powers,
    encode_powers,
    random_indices,
    round_stochastically,
    scale_of,
)

__all__ = [
    "clipped_cast",
    "decode_powers",
    "encode_powers",
    "pack_bits",
    "pack_codes",
    "random_indices",
    "round_stochastically",
    "scale_of",
    "top_k_indices",
    "unpack_bits",
    "unpack_codes",
]


def top_k_indices(x: Tensor, k: int) -> Tensor:
    """See `reference.top_k_indices`."""
    return cpu.top_k_indices(x, k) if x.device.type == "cpu" else reference.top_k_indices(x, k)


def pack_bits(bits: Tensor) -> Tensor:
    """See `reference.pack_bits`."""
    return cpu.pack_bits(bits) if bits.device.type == "cpu" else reference.pack_bits(bits)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """See `reference.unpack_bits`."""
    return cpu.unpack_bits(packed, n) if packed.device.type == "cpu" else reference.unpack_bits(packed, n)


def pack_codes(codes: Tensor, width: int) -> Tensor:
    """See `reference.pack_codes`."""
    return cpu.pack_codes(codes, width) if codes.device.type == "cpu" else reference.pack_codes(codes, width)


def unpack_codes(planes: Tensor, n: int) -> Tensor:
    """See `reference.unpack_codes`."""
    return cpu.unpack_codes(planes, n) if planes.device.type == "cpu" else reference.unpack_codes(planes, n)
