"""Top-k: the entries largest in magnitude.

``Q(x)_i = x_i`` for the ``k = max(1, floor(ratio n))`` entries of largest ``|x_i|``, else 0; ties go to the lowest
index. Contractive with delta >= k/n: needs error feedback, or a method that has it built in (CHOCO-SGD, AdaGossip,
DeepSqueeze). Bytes: k values, 4 each or fewer by `values`, and k indices, of 8.1 bits each where 1 % is kept and 4.8
where 10 % is (see `mpicomp.compression.indices`). Stich et al. 2018, arXiv 1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import index_field, scatter_add_, write_indices
from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.compression.ratio import check_ratio, kept
from mpicomp.compression.values import Values, check_values, read_values, value_fields, write_values
from mpicomp.state import State
from mpicomp.timing import timed, traced

_top_k = traced("select")(kernels.top_k)
_top_k_of_difference = traced("select")(kernels.top_k_of_difference)


@dataclass(frozen=True)
class TopK(Compressor):
    """Keep the largest entries.

    Attributes:
        ratio: the fraction of the entries that is kept, in (0, 1].
        values: how they travel: ``"full"``, ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"`` with a scale.

    """

    ratio: float
    values: Values = "full"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_values(self.values)

    def layout(self, spec: Spec) -> Layout:
        """Return ``scale`` if values have one, ``values`` (k,), and ``indices``, ascending, in the shorter form."""
        k = kept(spec.numel, self.ratio)
        return Layout((*value_fields(self.values, spec.dtype, k), index_field(spec.numel, k)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select the largest entries; raise DivergenceError if there is a NaN."""
        values, indices = _top_k(x, kept(spec.numel, self.ratio))
        return self._message(values, indices, spec)

    @timed("compress")
    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Select without forming the difference; raise DivergenceError if there is a NaN."""
        values, indices = _top_k_of_difference(x, x_hat, kept(spec.numel, self.ratio))
        message = self._message(values, indices, spec)
        kernels.scatter_add_(x_hat, indices, read_values(message, x_hat.dtype))
        return message

    def _message(self, values: Tensor, indices: Tensor, spec: Spec) -> Payload:
        field = index_field(spec.numel, len(indices))
        return {**write_values(values, self.values), **write_indices(indices, spec.numel, field)}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``."""
        scatter_add_(out, payload, read_values(payload, out.dtype), weight)
