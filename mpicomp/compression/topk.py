"""Top-k: the entries largest in magnitude.

``Q(x)_i = x_i`` for the ``k = max(1, floor(ratio n))`` entries of largest ``|x_i|``, else 0; ties go to the lowest
index. Contractive with delta >= k/n: needs error feedback, or a method that has it built in (CHOCO-SGD, AdaGossip,
DeepSqueeze). Bytes: k values and k indices of 2 bytes (n <= 65536) or 4. Stich et al. 2018, arXiv 1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor, Field, Layout, Payload, Spec, State, index_dtype
from mpicomp.compression.ratio import check_ratio, kept
from mpicomp.timing import timed


@dataclass(frozen=True)
class TopK(Compressor):
    """Keep the largest entries.

    Attributes:
        ratio: the fraction of the entries that is kept, in (0, 1].

    """

    ratio: float

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def layout(self, spec: Spec) -> Layout:
        """``values`` (k,), ``indices`` (k,) ascending."""
        k = kept(spec.numel, self.ratio)
        return Layout((Field("values", spec.dtype, k), Field("indices", index_dtype(spec.numel), k)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Select the largest entries; DivergenceError if there is a NaN."""
        return _payload(*kernels.top_k(x, kept(spec.numel, self.ratio)), spec)

    @timed("compress")
    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Select without forming the difference; DivergenceError if there is a NaN."""
        values, indices = kernels.top_k_of_difference(x, x_hat, kept(spec.numel, self.ratio))
        kernels.scatter_add_(x_hat, indices, values)
        return _payload(values, indices, spec)

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """``out[indices] += weight * values``."""
        kernels.scatter_add_(out, payload["indices"], payload["values"], weight)


def _payload(values: Tensor, indices: Tensor, spec: Spec) -> Payload:
    return {"values": values, "indices": indices.to(index_dtype(spec.numel))}
