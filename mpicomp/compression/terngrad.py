"""TernGrad: minus one, zero or one, times the largest magnitude.

``Q(x)_i = c sign(x_i) b_i`` with ``b_i = 1`` with probability ``|x_i| / max|x|``, else 0. ``c = max|x|`` is unbiased,
of large variance: meant for gradients, tensor by tensor. `contractive` sets ``c = |x|_2^2 / |x|_1``, which minimizes
the expected error, with ``delta = |x|_2^2 / (max|x| |x|_1) >= 2 / (1 + sqrt(n))``; the paper does not have it. Bytes:
``4 + 2 ceil(n / 8)``. Wen et al. 2017, arXiv 1705.07878.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, blocks
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, uniform
from mpicomp.kernels.reference import finite, pack_codes, packed_nbytes, unpack_codes
from mpicomp.timing import timed


@dataclass(frozen=True)
class TernGrad(Compressor):
    """Quantize to three values.

    Attributes:
        contractive: whether the result is shrunk so that Q contracts, as methods need that remember errors.
        seed: of the rounding.

    """

    contractive: bool = False
    seed: int = 0

    @property
    def is_unbiased(self) -> bool:
        """True unless `contractive` is set."""
        return not self.contractive

    @property
    def is_contractive(self) -> bool:
        """Whether `contractive` is set; the variance may exceed |x|^2 otherwise."""
        return self.contractive

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of this rank's random stream."""
        return Draws(stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``scale`` (1,) and packed ``codes``: 0 for zero, 1 for one, 2 for minus one."""
        return Layout(
            (
                Field("scale", torch.float32, 1, must_be="finite"),
                Field("codes", torch.uint8, packed_nbytes(spec.numel, 2)),
            )
        )

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Round each entry at random to -1, 0 or 1 times the scale; raise DivergenceError for NaN and infinity."""
        magnitude = x.abs()
        largest = magnitude.max().to(torch.float32) if len(x) else torch.zeros((), device=x.device)
        if x.is_cpu:
            finite(float(largest))
        chosen = uniform(x, self.seed, state) * largest < magnitude
        codes = chosen * (1 + (x < 0).to(torch.uint8))
        scale = largest * _shrinking(magnitude, largest) if self.contractive else largest
        return {"scale": scale.reshape(1), "codes": pack_codes(codes, 2)}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * scale * code``."""
        scale = payload["scale"].double().mul_(weight).to(out.dtype)
        for start, stop in blocks(spec.numel):
            codes = unpack_codes(payload["codes"], 2, spec.numel, start, stop)
            out[start:stop].addcmul_(((codes & 1) - (codes >> 1)).to(out.dtype), scale)  # alpha is on the host


def _shrinking(magnitude: Tensor, largest: Tensor) -> Tensor:
    """Return delta, ``|x|_2^2 / (max|x| |x|_1)``; 0 for zeros."""
    relative = magnitude / largest  # its squares do not overflow
    return (relative.square().sum() / relative.sum()).nan_to_num(nan=0.0).to(torch.float32)
