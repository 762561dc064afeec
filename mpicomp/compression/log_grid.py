"""Logarithmic grid: magnitudes rounded to zero or a power of two times the largest one.

``Q(x)_i = max|x|`` times whichever of ``0, ±2**-k, ..., ±1/2, ±1`` is nearest to ``x_i / max|x|``; halfway, the one of
larger magnitude. ``k = 0`` is ternary. No entry is moved by more than its own magnitude, and the largest not at all, so
Q contracts with ``delta >= max|x|^2 / |x|^2``; it is biased and needs error feedback. Bytes:
``4 + ceil(n / 8) ceil(log2(2 k + 3))``. The grid that Quantized Adam (Chen et al. 2020, arXiv 2004.14180) and
Efficient-Adam (arXiv 2205.14473) use for updates, tensor by tensor; its definition is from memory of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.errors import ConfigError
from mpicomp.kernels.reference import packed_nbytes
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass(frozen=True)
class LogGrid(Compressor):
    """Round to powers of two of the largest magnitude.

    Attributes:
        k: the smallest magnitude that is kept is ``2**-k`` of the largest, 0 to 30; 2 k + 3 values.

    """

    k: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.k <= 30:
            raise ConfigError(f"compression.k = {self.k} must be in 0...30: powers of two below the largest magnitude")

    @property
    def _bits(self) -> int:
        return 1 + (self.k + 1).bit_length()

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``scale`` (1,) and packed ``codes``: sign in the lowest bit, then the place on the grid."""
        nbytes = packed_nbytes(spec.numel, self._bits)
        return Layout((Field("scale", torch.float32, 1, must_be="finite"), Field("codes", torch.uint8, nbytes)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Round and pack; raise DivergenceError for NaN and infinity."""
        scale = kernels.largest(x).to(torch.float32)
        # between 0 and 2**-k the middle is half of that, between two powers three quarters of the larger one
        middles = [2.0 ** -(self.k + 1), *(0.75 * 2.0**-i for i in reversed(range(self.k)))]
        codes = kernels.round_to_grid(x, scale, middles, self._bits)
        return {"scale": scale, "codes": codes}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * scale * value``."""
        grid = [0.0, *(2.0**-i for i in reversed(range(self.k + 1)))]
        kernels.add_gridded_(out, payload["codes"], grid, self._bits, payload["scale"], weight)
