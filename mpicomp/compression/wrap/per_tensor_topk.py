"""Top-k of each tensor of a model, selected at once and sent as one message: what `PerTensor` does with `TopK`.

``k = max(1, floor(ratio n))`` entries of each tensor of n, as of `TopK`. Bytes: the values and one code of all indices,
which ascend over the whole model; a `scale` for each tensor, where values have one; and the uncompressed tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.indices import index_field, scatter_add_, write_indices
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.ratio import kept
from mpicomp.compression.topk import TopK
from mpicomp.compression.values import read_values, value_fields, write_values
from mpicomp.errors import DivergenceError
from mpicomp.state import State
from mpicomp.timing import traced

_top_k_of_parts = traced("select")(kernels.top_k_of_parts)


@dataclass(frozen=True)
class _Plan:
    """What is sent of the tensors of a model.

    Attributes:
        sizes: entries of each.
        counts: how many are selected of each.
        dense: where the tensors lie that are sent as they are.
        parts: the names of the tensors, and their counts.
        indices: the field of the indices.
        dense_fields: that of the tensors that are sent as they are, if there are any.

    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    dense: tuple[slice, ...]
    parts: tuple[tuple[str, int], ...]
    indices: Field
    dense_fields: tuple[Field, ...]


@functools.lru_cache(maxsize=64)
def _plan(ratio: float, dense_1d: bool, spec: Spec) -> _Plan:
    counts, dense, whole_parts, start = [], [], [], 0
    for part in spec.parts:
        whole = dense_1d and part.is_vector
        counts.append(0 if whole else kept(part.numel, ratio))
        if whole:
            dense.append(slice(start, start + part.numel))
            whole_parts.append((part.names[0], part.numel))
        start += part.numel
    sizes = tuple(part.numel for part in spec.parts)
    field = Field("dense", spec.dtype, sum(n for _, n in whole_parts), must_be="a number", parts=tuple(whole_parts))
    return _Plan(
        sizes,
        tuple(counts),
        tuple(dense),
        tuple(zip(spec.names, counts, strict=True)),
        index_field(spec.numel, sum(counts)),
        (field,) if dense else (),
    )


@dataclass(frozen=True)
class PerTensorTopK(Compressor):
    """The operations of `PerTensor`, which has no state here.

    Attributes:
        inner: the ratio, and how values travel.
        dense_1d: as in `PerTensor`.

    """

    inner: TopK
    dense_1d: bool

    def _plan(self, spec: Spec) -> _Plan:
        return _plan(self.inner.ratio, self.dense_1d, spec)

    def layout(self, spec: Spec) -> Layout:
        """Return ``scale`` if values have one, ``values``, ``indices`` of all tensors, and ``dense`` if any are."""
        plan = self._plan(spec)
        values = value_fields(self.inner.values, spec.dtype, sum(plan.counts), parts=plan.parts)
        return Layout((*values, plan.indices, *plan.dense_fields))

    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Return the message for `x` (n,); DivergenceError names a tensor with a NaN."""
        return self._message(x, None, *self._select(x, None, spec), spec)

    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Return the message for ``x - x_hat``, and add it to `x_hat`."""
        values, indices = self._select(x, x_hat, spec)
        payload = self._message(x, x_hat, values, indices, spec)
        plan = self._plan(spec)
        kernels.scatter_add_(x_hat, indices, read_values(payload, x_hat.dtype, plan.counts))
        self._add_dense(payload, plan, x_hat, 1.0)
        return payload

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out[indices] += weight * values``, and add the uncompressed tensors."""
        plan = self._plan(spec)
        scatter_add_(out, payload, read_values(payload, out.dtype, plan.counts), weight)
        self._add_dense(payload, plan, out, weight)

    def _select(self, x: Tensor, y: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
        plan = self._plan(spec)
        try:
            return _top_k_of_parts(x, y, plan.sizes, plan.counts)
        except DivergenceError as error:
            tensors = zip(spec.parts, spec.split(x if y is None else x - y), strict=True)
            name = next(part.names[0] for part, values in tensors if values.isnan().any())
            raise DivergenceError(f"{name}: {error}") from error

    def _message(self, x: Tensor, y: Tensor | None, values: Tensor, indices: Tensor, spec: Spec) -> Payload:
        plan = self._plan(spec)
        payload = write_values(values, self.inner.values, plan.counts)
        payload.update(write_indices(indices, spec.numel, plan.indices))
        if plan.dense:
            payload["dense"] = torch.cat([x[part] if y is None else x[part] - y[part] for part in plan.dense])
        return payload

    @staticmethod
    def _add_dense(payload: Payload, plan: _Plan, out: Tensor, weight: float) -> None:
        start = 0
        for part in plan.dense:
            end = start + part.stop - part.start
            out[part].add_(payload["dense"][start:end], alpha=weight)
            start = end
