"""Hard threshold: the entries above an absolute size.

``Q(x)_i = x_i`` where ``|x_i| >= threshold``, else 0. An absolute compressor: ``|Q(x) - x|^2 <= n threshold^2``,
however large x is; not contractive, since a small x is not sent at all. Needs error feedback. Bytes: two counts of 4,
and per entry sent a value of 4, or fewer by `values`, and a coded index (see `mpicomp.compression.indices`).
Sahu et al. 2021, arXiv 2108.00951.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import any_index_field, scatter_add_, write_indices
from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.compression.values import Values, check_values, read_values, value_fields, write_values
from mpicomp.errors import ConfigError
from mpicomp.state import State
from mpicomp.timing import timed, traced

_above = traced("select")(kernels.above)


@dataclass(frozen=True)
class HardThreshold(Compressor):
    """Keep large entries.

    Attributes:
        threshold: in the unit of the entries, > 0.
        values: how they travel, as in `TopK`.

    """

    threshold: float
    values: Values = "full"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise ConfigError(f"compression.threshold = {self.threshold} must be a finite number > 0")
        check_values(self.values)

    @property
    def is_contractive(self) -> bool:
        """False: of a small vector nothing is sent."""
        return False

    @property
    def amplifies(self) -> bool:
        """False: what is sent is right, and the rest is left out."""
        return False

    def layout(self, spec: Spec) -> Layout:
        """Return ``scale`` if values have one, ``values``, at most (n,), and ``indices``, coded."""
        n = spec.numel
        return Layout((*value_fields(self.values, spec.dtype, n, variable=True), any_index_field(n)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select the large entries; raise DivergenceError for a NaN, which no comparison would select."""
        values, indices = _above(x, self.threshold)
        n = spec.numel
        return {**write_values(values, self.values), **write_indices(indices, n, any_index_field(n))}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``."""
        scatter_add_(out, payload, read_values(payload, out.dtype), weight)
