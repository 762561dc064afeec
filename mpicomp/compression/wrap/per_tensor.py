"""Per tensor: a compressor applied to each tensor of the model by itself.

The papers compress layer by layer, so that a layer with small entries is not left out, and a scale fits its layer.
Bytes: those of the inner compressor, tensor by tensor; at least one entry of each for the sparse ones. Top-k has one
message for all tensors (`per_tensor_topk`), and so has the random block, whose values can be added up
(`per_tensor_block`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, Wrapper
from mpicomp.compression.block import RandomBlock
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import LONGEST, Layout, Payload, Spec
from mpicomp.compression.random import Draws, mix64
from mpicomp.compression.topk import TopK
from mpicomp.compression.wrap.per_tensor_block import PerTensorBlock
from mpicomp.compression.wrap.per_tensor_topk import PerTensorTopK
from mpicomp.errors import DivergenceError
from mpicomp.state import State
from mpicomp.timing import timed

V = TypeVar("V")


@dataclass
class PerTensorState:
    """The states of the inner compressor, one for each tensor."""

    parts: list[State]


@dataclass(frozen=True)
class PerTensor(Wrapper):
    """Compress tensor by tensor.

    Attributes:
        inner: the compressor of each.
        dense_1d: whether tensors of fewer than two dimensions (biases, scales of normalizations) are sent uncompressed.

    """

    dense_1d: bool = False

    def exempts(self, part: Spec) -> bool:
        """Return whether the tensor of `part` is one of less than two dimensions, where those are sent as they are."""
        return self.dense_1d and part.is_vector

    @property
    def has_common_support(self) -> bool:
        """Whether the values of all tensors are one vector of common support, as those of the random block are."""
        return isinstance(self.inner, RandomBlock)

    def _at_once(self, spec: Spec) -> Compressor | None:
        """Return the version that compresses all tensors at once, or None if the inner compressor has none."""
        if isinstance(self.inner, TopK) and spec.numel <= LONGEST:
            return PerTensorTopK(self.inner, self.dense_1d)
        if isinstance(self.inner, RandomBlock):
            return PerTensorBlock(self.inner, self.dense_1d)
        return None

    def _of(self, part: Spec) -> Compressor:
        return Identity() if self.exempts(part) else self.inner

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> State:
        """Return the inner compressor's initial states, one for each tensor, or one for all."""
        if at_once := self._at_once(spec):
            return at_once.init(spec, device, stream)
        states = [self._of(part).init(part, device, mix64(stream, i)) for i, part in enumerate(spec.parts)]
        for i, state in enumerate(states):
            if isinstance(state, Draws) and self.inner.leaves_out_same_entries:
                state.stream = mix64(2, i)  # the ranks share it, but tensors of one shape do not
        return PerTensorState(states)

    def layout(self, spec: Spec) -> Layout:
        """Return the inner layouts of all tensors, one after the other."""
        if at_once := self._at_once(spec):
            return at_once.layout(spec)
        return Layout.concatenate([self._of(part).layout(part) for part in spec.parts], spec.names)

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Compress each tensor; a DivergenceError names a tensor with a NaN."""
        if at_once := self._at_once(spec):
            return at_once.compress(x, spec, state)

        def compress(values: Tensor, part: Spec, inner: State) -> Payload:
            return self._of(part).compress(values, part, inner)

        return self._each(compress, spec, state, spec.split(x))

    @timed("compress")
    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Compress the difference of each tensor; a DivergenceError names a tensor with a NaN."""
        if at_once := self._at_once(spec):
            return at_once.compress_difference_(x, x_hat, spec, state, scratch)

        def compress(vectors: tuple[Tensor, Tensor, Tensor], part: Spec, inner: State) -> Payload:
            values, public, room = vectors
            return self._of(part).compress_difference_(values, public, part, inner, room)

        vectors = zip(spec.split(x), spec.split(x_hat), spec.split(scratch), strict=True)
        return self._each(compress, spec, state, vectors)

    def _each(
        self, compress: Callable[[V, Spec, State], Payload], spec: Spec, state: PerTensorState, vectors: Iterable[V]
    ) -> Payload:
        """Apply `compress` to the `vectors` of each tensor and return the messages as one."""
        payload: Payload = {}
        for i, (part, values) in enumerate(zip(spec.parts, vectors, strict=True)):
            try:
                message = compress(values, part, state.parts[i])
            except DivergenceError as error:
                raise DivergenceError(f"{part.names[0]}: {error}") from error
            payload.update({f"{i}.{name}": tensor for name, tensor in message.items()})
        return payload

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add the part of the message for each tensor to that tensor in `out`."""
        if at_once := self._at_once(spec):
            at_once.accumulate(payload, spec, out, weight)
            return
        messages: list[Payload] = [{} for _ in spec.parts]
        for key, tensor in payload.items():
            i, _, name = key.partition(".")
            messages[int(i)][name] = tensor
        for message, part, values in zip(messages, spec.parts, spec.split(out), strict=True):
            self._of(part).accumulate(message, part, values, weight)
