"""Sampled top-k: nearly the largest entries, by a threshold found on a sample. DGC's selection.

    tau = the magnitude of the (ratio m)-th largest of m sampled entries      a stride apart, from a random start
    more than 1.3 k entries above tau:   exactly the k largest of those
    fewer than 0.8 k:                    tau = 0.8 tau, 10 times at most
    ``Q(x)_i = x_i`` for the first k of what is above tau, else 0             k = max(1, floor(ratio n))

For comparison with DGC's code: `TopK` selects exactly, in one pass over the vector where kernels are compiled. Vectors
too short for a sample of 32 are searched exactly. Not contractive for certain, since a sample may miss the large
entries; needs error feedback. Bytes: as a hard threshold of at most k entries. Lin et al. 2018, arXiv 1712.01887; the
constants are those of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import any_index_field, scatter_add_, write_indices
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, mix64
from mpicomp.compression.ratio import check_ratio, kept
from mpicomp.errors import ConfigError
from mpicomp.timing import timed, traced

_TOO_MANY = 1.3
_TOO_FEW = 0.8
_LOWERED = 0.8
_ROUNDS = 10
_LEAST = 32

_above = traced("select")(kernels.above)
_top_k = traced("select")(kernels.top_k)


@dataclass(frozen=True)
class SampledTopK(Compressor):
    """Keep about the largest entries.

    Attributes:
        ratio: the fraction of the entries that is kept at most, in (0, 1].
        sample: the fraction of the entries that is looked at to find the threshold, in (0, 1].
        seed: of the start of the sample.

    """

    ratio: float
    sample: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if not 0 < self.sample <= 1:
            raise ConfigError(f"compression.sample = {self.sample} must be in (0, 1]: a fraction of the entries")

    @property
    def is_contractive(self) -> bool:
        """False: a sample may miss the large entries."""
        return False

    @property
    def amplifies(self) -> bool:
        """False: what is sent is right, and the rest is left out."""
        return False

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of this rank's random stream."""
        return Draws(stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``values``, at most (k,), and ``indices``, coded."""
        k = kept(spec.numel, self.ratio)
        return Layout((Field("values", spec.dtype, k, variable=True), any_index_field(spec.numel)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Estimate the threshold from a sample, then select; raise DivergenceError if there is a NaN."""
        n, k = spec.numel, kept(spec.numel, self.ratio)
        start = mix64(self.seed, state.step, state.stream)
        state.step += 1
        threshold = self._threshold(x, start)
        values, indices = _above(x, threshold)
        for _ in range(_ROUNDS):
            if len(values) >= _TOO_FEW * k:
                break
            threshold *= _LOWERED
            values, indices = _above(x, threshold)
        if len(values) > _TOO_MANY * k:
            values, chosen = _top_k(values, k)
            indices = indices[chosen.long()]
        values, indices = values[:k], indices[:k].contiguous()
        return {"values": values, **write_indices(indices, n, any_index_field(n))}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``."""
        scatter_add_(out, payload, payload["values"], weight)

    def _threshold(self, x: Tensor, start: int) -> float:
        """Return the threshold: the magnitude of the smallest entry of the sample that is kept."""
        stride = max(1, int(1 / self.sample) // 32 * 32 + 1)
        sampled = x[start % stride :: stride].contiguous() if len(x) >= _LEAST * stride else x
        values, _ = _top_k(sampled, kept(len(sampled), self.ratio))
        return float(values.abs().min()) if len(values) else 0.0
