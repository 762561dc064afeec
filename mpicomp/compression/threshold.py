"""Hard threshold: the entries above an absolute size.

``Q(x)_i = x_i`` where ``|x_i| >= threshold``, else 0. An absolute compressor: ``|Q(x) - x|^2 <= n threshold^2``,
however large x is; not contractive, since a small x is not sent at all. Needs error feedback. Bytes: two counts
of 4, and a value and an index (2 or 4 bytes) per entry sent, at most all n. Sahu et al. 2021, arXiv 2108.00951.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor, Field, Layout, Payload, Spec, State, index_dtype
from mpicomp.errors import ConfigError
from mpicomp.timing import timed


@dataclass(frozen=True)
class HardThreshold(Compressor):
    """Keep large entries.

    Attributes:
        threshold: in the unit of the entries, > 0.

    """

    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise ConfigError(f"compression.threshold = {self.threshold} must be a finite number > 0")

    @property
    def is_contractive(self) -> bool:
        """A small vector is not sent at all."""
        return False

    def layout(self, spec: Spec) -> Layout:
        """``values`` and ``indices``, at most (n,)."""
        n = spec.numel
        return Layout((Field("values", spec.dtype, n, True), Field("indices", index_dtype(n), n, True)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select; a NaN is below every threshold and is not sent, so refuse it: DivergenceError."""
        values, indices = kernels.above(x, self.threshold)
        return {"values": values, "indices": indices.to(index_dtype(spec.numel))}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """``out[indices] += weight * values``."""
        kernels.scatter_add_(out, payload["indices"], payload["values"], weight)
