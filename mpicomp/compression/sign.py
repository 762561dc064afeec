"""Sign with norm: one bit an entry.

``Q(x) = mean(|x|) sign(x)`` with ``sign(0) = 1``. Contractive with ``delta = |x|_1^2 / (n |x|_2^2)``; needs error
feedback. Bytes: ``4 + ceil(n / 8)``. Karimireddy et al. 2019, arXiv 1901.09847.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, Field, Layout, Payload, Spec, State, blocks
from mpicomp.kernels.reference import pack_bits, packed_nbytes, unpack_bits
from mpicomp.timing import timed


@dataclass(frozen=True)
class SignNorm(Compressor):
    """Send signs, scaled by the mean magnitude."""

    def layout(self, spec: Spec) -> Layout:
        """``scale`` (1,), ``signs`` (ceil(n / 8),) packed."""
        return Layout((Field("scale", torch.float32, 1), Field("signs", torch.uint8, packed_nbytes(spec.numel, 1))))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Form the scale and pack the signs."""
        total = x.abs().sum(dtype=torch.float64)  # wide, for a sum of huge entries must not overflow
        scale = (total / max(1, spec.numel)).to(torch.float32).reshape(1)
        return {"scale": scale, "signs": pack_bits(x >= 0)}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """``out += weight * scale * signs``."""
        scale = weight * float(payload["scale"])
        for start, stop in blocks(spec.numel):
            signs = unpack_bits(payload["signs"], spec.numel, start, stop).to(out.dtype).mul_(2).sub_(1)
            out[start:stop].add_(signs, alpha=scale)
