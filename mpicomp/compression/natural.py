"""Natural compression: magnitudes rounded at random to a power of two.

For ``2**e <= |x_i| < 2**(e+1)``, ``Q(x)_i`` is ``sign(x_i) 2**(e+1)`` with probability ``|x_i| / 2**e - 1``, else
``sign(x_i) 2**e``. Unbiased with variance at most ``|x|^2 / 8``, so it does little harm even without error feedback.
Bytes: ``n + ceil(n / 8)``, exponent and sign of float32; values beyond the powers of two of float32 saturate, those
below become zero. Horvath et al. 2019, arXiv 1905.10988.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, blocks
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, uniform
from mpicomp.errors import DivergenceError
from mpicomp.kernels.reference import NOT_FINITE, pack_bits, packed_nbytes, unpack_bits
from mpicomp.timing import timed

_BIAS = 127
"""The number added to an exponent on the wire; 0 stands for the value zero, 1 to 254 for 2**-126 to 2**127."""

_NOT_FINITE = 255
"""What stands for NaN and infinity where who sends them would have to wait for a device to notice them."""


@dataclass(frozen=True)
class Natural(Compressor):
    """Round to powers of two.

    Attributes:
        seed: of the rounding.

    """

    seed: int = 0

    @property
    def is_unbiased(self) -> bool:
        """True: the probabilities of rounding are chosen for it."""
        return True

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of this rank's random stream."""
        return Draws(stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``exponents`` (n,), biased, and ``signs`` (ceil(n / 8),), packed."""
        signs = Field("signs", torch.uint8, packed_nbytes(spec.numel, 1))
        return Layout((Field("exponents", torch.uint8, spec.numel), signs))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Return the exponents, rounded at random, and the signs; raise DivergenceError for NaN and infinity."""
        mantissa, exponent = torch.frexp(x if x.dtype == torch.float64 else x.to(torch.float32))
        magnitude = mantissa.abs()  # from 0.5 to 1, 0 for 0; NaN or infinity for what is not finite
        is_finite = magnitude < 1
        if x.is_cpu and not is_finite.all():
            raise DivergenceError(NOT_FINITE)
        up = uniform(x, self.seed, state) < magnitude * 2 - 1
        biased = (exponent + up + (_BIAS - 1)).clamp_(0, 254) * (mantissa != 0)
        exponents = biased.masked_fill_(~is_finite, _NOT_FINITE).to(torch.uint8)
        return {"exponents": exponents, "signs": pack_bits(x < 0)}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * sign * 2**exponent``, infinite for what was not finite: 2**128 in float32."""
        for start, stop in blocks(spec.numel):
            biased = payload["exponents"][start:stop].to(torch.int32)
            signs = 1 - 2 * unpack_bits(payload["signs"], spec.numel, start, stop).to(torch.float32)
            values = torch.ldexp(signs, biased - _BIAS).mul_(biased != 0)
            out[start:stop].add_(values.to(out.dtype), alpha=weight)
