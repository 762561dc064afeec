"""Top-k: the entries largest in magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp.compression.base import Compressor, Field, Layout, Payload, Spec, State, index_dtype, read_index
from mpicomp.kernels.reference import top_k_indices
from mpicomp.timing import timed


@dataclass(frozen=True)
class TopK(Compressor):
    """Keep the fraction `ratio` of the entries."""

    ratio: float

    def layout(self, spec: Spec) -> Layout:
        k = max(1, int(spec.numel * self.ratio))
        return Layout((Field("values", spec.dtype, k), Field("indices", index_dtype(spec.numel), k)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        index = top_k_indices(x, max(1, int(spec.numel * self.ratio)))
        return {"values": x[index], "indices": index.to(index_dtype(spec.numel))}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        out.index_add_(0, read_index(payload["indices"]), payload["values"], alpha=weight)
