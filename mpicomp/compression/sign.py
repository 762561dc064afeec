"""Sign with norm: one bit an entry.

``Q(x) = mean(|x|) sign(x)`` with ``sign(0) = 1``. Contractive with ``delta = |x|_1^2 / (n |x|_2^2)``; needs error
feedback. Bytes: ``4 + ceil(n / 8)``. Karimireddy et al. 2019, arXiv 1901.09847.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.kernels.reference import packed_nbytes
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass(frozen=True)
class SignNorm(Compressor):
    """Send signs, scaled by the mean magnitude."""

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``scale`` (1,) and ``signs`` (ceil(n / 8),), packed."""
        signs = Field("signs", torch.uint8, packed_nbytes(spec.numel, 1))
        return Layout((Field("scale", torch.float32, 1, must_be="finite"), signs))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Compute the scale and pack the signs; raise DivergenceError for NaN and infinity."""
        return {"scale": kernels.mean_magnitude(x), "signs": kernels.pack_signs(x)}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * scale * signs``."""
        kernels.add_signs_(out, payload["signs"], payload["scale"], weight)
