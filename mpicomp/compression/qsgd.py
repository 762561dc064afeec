"""QSGD: magnitudes rounded at random to a few levels of the norm.

With ``S = 2**bits - 1`` levels, ``Q(x)_i = c |x| sign(x_i) l_i / S`` where ``l_i`` is ``S |x_i| / |x|`` rounded up
with the probability of its fraction. ``c = 1`` is unbiased with variance at most ``min(n / S^2, sqrt(n) / S) |x|^2``;
`contractive` sets ``c = 1 / (1 + min(n / S^2, sqrt(n) / S))``, with delta = c. Bytes: ``4 + ceil(n / 8) (bits + 1)``.
Alistarh et al. 2017, arXiv 1610.02132.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, next_seed
from mpicomp.errors import ConfigError
from mpicomp.kernels.reference import packed_nbytes
from mpicomp.timing import timed


@dataclass(frozen=True)
class QSGD(Compressor):
    """Quantize against the Euclidean norm.

    Attributes:
        bits: per magnitude, 1 to 8; the sign is one more.
        contractive: whether the result is shrunk so that Q contracts, as CHOCO-SGD needs.
        seed: of the rounding.

    """

    bits: int = 4
    contractive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"compression.bits = {self.bits} must be in 1...8: the bits of a magnitude")

    @property
    def is_unbiased(self) -> bool:
        """True unless `contractive` is set."""
        return not self.contractive

    @property
    def is_contractive(self) -> bool:
        """Whether `contractive` is set, so that the result is shrunk."""
        return self.contractive

    @property
    def _levels(self) -> int:
        return (1 << self.bits) - 1

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of this rank's random stream."""
        return Draws(stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``scale`` (1,) and packed ``codes``: sign in the lowest bit, level in those above."""
        nbytes = packed_nbytes(spec.numel, self.bits + 1)
        return Layout((Field("scale", torch.float32, 1, must_be="finite"), Field("codes", torch.uint8, nbytes)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Round at random and pack; ``scale`` is c |x| / S. Raises DivergenceError for NaN and infinity."""
        seed = next_seed(self.seed, state)
        unit = kernels.norm(x, self._levels)
        scale = unit * (1 / (1 + self._variance(spec.numel))) if self.contractive else unit
        return {"scale": scale.to(torch.float32), "codes": kernels.quantize(x, unit, self.bits, seed)}

    def _variance(self, n: int) -> float:
        return min(n / self._levels**2, math.sqrt(n) / self._levels)

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * scale * (1 - 2 sign) * level``."""
        kernels.add_quantized_(out, payload["codes"], self.bits, payload["scale"], weight)
