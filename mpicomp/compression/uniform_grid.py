"""Uniform grid: entries rounded to the nearest of evenly spaced values.

``Q(x)_i = max|x| / S`` times the whole number nearest to ``S x_i / max|x|``; halfway, the even one.
``S = 2**bits - 1``, so that a magnitude takes `bits` bits. No entry is moved by more than its own magnitude nor by more
than half a step, and the largest not at all, so Q contracts; it is biased and needs error feedback. Bytes:
``4 + ceil(n / 8) (bits + 1)``. Quantized Adam (Chen et al. 2020, arXiv 2004.14180) rounds weights this way, but to
multiples of ``2**-k`` (from memory of the paper), whose largest value would need another bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor, blocks
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.errors import ConfigError
from mpicomp.kernels.reference import pack_codes, packed_nbytes
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass(frozen=True)
class UniformGrid(Compressor):
    """Round to multiples of a fraction of the largest magnitude.

    Attributes:
        bits: per magnitude, 1 to 8; the sign is one more.

    """

    bits: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"compression.bits = {self.bits} must be in 1...8: the bits of a magnitude")

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``scale`` (1,) and packed ``codes``: sign in the lowest bit, multiple in those above."""
        nbytes = packed_nbytes(spec.numel, self.bits + 1)
        return Layout((Field("scale", torch.float32, 1, must_be="finite"), Field("codes", torch.uint8, nbytes)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Round and pack; ``scale`` is ``max|x| / S``. Raises DivergenceError for NaN and infinity."""
        levels = (1 << self.bits) - 1
        largest = kernels.largest(x).double()
        scale = (largest / torch.full_like(largest, levels)).to(torch.float32)  # by a number, a GPU would not divide
        unit = scale.masked_fill(scale == 0, math.inf)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        codes = []
        for start, stop in blocks(spec.numel):
            part = x[start:stop]
            multiples = part.to(wide).abs().div_(unit).round_().clamp_(max=levels)
            codes.append(multiples.to(torch.int16) << 1 | (part < 0))
        packed = pack_codes(torch.cat([*codes, torch.empty(0, dtype=torch.int16, device=x.device)]), self.bits + 1)
        return {"scale": scale, "codes": packed}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * scale * multiple``."""
        kernels.add_quantized_(out, payload["codes"], self.bits, payload["scale"], weight)
