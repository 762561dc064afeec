"""Nonzero: the vector as it is; only entries that are not zero travel.

``Q(x) = x``. A hub sends sums of sparse messages back with it. It is lossless, so all ranks hold the same bits.
Bytes of k entries: two counts of 4, k values, and k coded indices (see `mpicomp.compression.indices`); the plain vector
where that is shorter. A negative zero arrives as a positive one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import any_index_field, scatter_add_, write_indices
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.kernels.reference import trim_code
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass(frozen=True)
class Nonzero(Compressor):
    """Send all entries that are not zero."""

    @property
    def is_unbiased(self) -> bool:
        """True, because Q(x) = x."""
        return True

    def layout(self, spec: Spec) -> Layout:
        """Return ``values``, at most (n,), and ``indices``, coded; there are none if all values are sent."""
        n = spec.numel
        return Layout((Field("values", spec.dtype, n, variable=True), any_index_field(n)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Leave out the zeros; raise DivergenceError if there is a NaN."""
        values, indices = kernels.above(x, _smallest(x.dtype))
        code = write_indices(indices, spec.numel, any_index_field(spec.numel))["indices"]
        room = (spec.numel - values.numel()) * x.element_size()
        if code.numel() >= room and not code.is_cpu:
            code = trim_code(code)
        if code.numel() < room:
            return {"values": values, "indices": code}
        return {"values": x, "indices": code[:0]}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``."""
        values = payload["values"]
        if values.numel() == spec.numel and not payload["indices"].numel():
            out.add_(values, alpha=weight)
        else:
            scatter_add_(out, payload, values, weight)


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest number above zero, a denormal one."""
    limits = torch.finfo(dtype)
    return float(limits.smallest_normal * limits.eps)
