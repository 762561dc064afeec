"""A random block of each tensor of a model, sent as one vector: what `PerTensor` does with `RandomBlock`.

    k_i = max(1, floor(ratio n_i))                         entries of tensor i, which has n_i
    s_i = hash(seed, step, i) mod n_i                      where its block begins
    values = x_i[s_i], x_i[s_i + 1], ..., k_i of them, modulo n_i    of all tensors, one behind the other

So a block goes on at the front of its tensor when it reaches the end, every entry is as likely as any other, and the
tensors' starts are independent. They are the same on all ranks: the support is common, and the values of all tensors
are one vector that sums travel on, as for a single block. Contractive in expectation with delta = min k_i / n_i. The
tensors that are not compressed are whole blocks from 0.

Bytes: the values and 16. As in the authors' code for DEF (Xu et al., ``anxuthu/DEF``), but for the hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor
from mpicomp.compression.block import RandomBlock
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, mix64
from mpicomp.compression.ratio import kept
from mpicomp.timing import timed


@dataclass(frozen=True)
class PerTensorBlock(Compressor):
    """The operations of `PerTensor`.

    Attributes:
        inner: the ratio and the seed.
        dense_1d: as in `PerTensor`.

    """

    inner: RandomBlock
    dense_1d: bool

    def _lengths(self, spec: Spec, ratio: float) -> list[int]:
        """Return how many entries are sent of each tensor."""
        return [part.numel if self.dense_1d and part.is_vector else kept(part.numel, ratio) for part in spec.parts]

    def _pieces(self, seed: int, ratio: float, spec: Spec) -> Iterator[slice]:
        """Yield where in the flat vector the values lie, in their order: one or two slices for each tensor."""
        begin = 0
        for i, (part, length) in enumerate(zip(spec.parts, self._lengths(spec, ratio), strict=True)):
            n = part.numel
            start = mix64(seed, i) % n if length < n else 0
            yield slice(begin + start, begin + min(n, start + length))
            if start + length > n:
                yield slice(begin, begin + start + length - n)
            begin += n

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of the random stream that all ranks share."""
        return self.inner.init(spec, device, stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``seed`` (1,), ``ratio`` (1,), and ``values``, the blocks of all tensors."""
        numel = sum(self._lengths(spec, self.inner.ratio))
        return Layout(
            (
                Field("seed", torch.int64, 1, on_host=True),
                Field("ratio", torch.float64, 1, on_host=True),
                Field("values", spec.dtype, numel),
            )
        )

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Draw the seed of this message and gather the blocks that it selects."""
        seed, ratio = mix64(self.inner.seed, state.step) >> 1, self.inner.ratio
        state.step += 1
        return {
            "seed": torch.tensor([seed]),
            "ratio": torch.tensor([ratio], dtype=torch.float64),
            "values": torch.cat([x[piece] for piece in self._pieces(seed, ratio, spec)]) if spec.parts else x[:0],
        }

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * values`` to the blocks of `out` that the message names."""
        values, read = payload["values"], 0
        for piece in self._pieces(int(payload["seed"]), float(payload["ratio"]), spec):
            length = piece.stop - piece.start
            out[piece].add_(values[read : read + length], alpha=weight)
            read += length
