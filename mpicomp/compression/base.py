"""WHAT is sent: a compressor turns a flat vector into a few named tensors, and adds such a message to a vector.

Messages are those of `mpicomp.compression.message`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.compression.message import Layout, Payload, Spec
from mpicomp.state import State
from mpicomp.timing import timed

BLOCK = 2**16
"""Entries that are decoded at a time: a multiple of 8, and few enough to stay in the cache."""


def blocks(n: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive blocks of ``[0, n)``, to decode without temporaries of the length of a model."""
    for start in range(0, n, BLOCK):
        yield start, min(n, start + BLOCK)


class Compressor(ABC):
    """An operator Q on flat vectors, with its message.

    Subclasses are final, frozen dataclasses of hyper-parameters. `init` makes the state, and `compress` changes it in
    place from step to step. The state of a compressor without one is None.
    """

    @property
    def is_unbiased(self) -> bool:
        """Whether E[Q(x)] = x."""
        return False

    @property
    def is_contractive(self) -> bool:
        """Whether E|Q(x) - x|^2 <= (1 - delta) |x|^2 for some delta in (0, 1]."""
        return True

    @property
    def amplifies(self) -> bool:
        """Whether E|Q(x) - x|^2 may exceed |x|^2, so that an error memory grows without bound."""
        return not self.is_contractive

    @property
    def relative_error(self) -> float:
        """A bound on |Q(x)_i - x_i| / |x_i| of every entry in the normal range; infinite if none is known."""
        return math.inf

    @property
    def is_lossless(self) -> bool:
        """Whether Q(x) = x."""
        return self.relative_error == 0

    @property
    def remembers_errors(self) -> bool:
        """Whether what a message leaves out is added to the next one."""
        return False

    def exempts(self, part: Spec) -> bool:
        """Return whether the tensor of `part` is exempt from compression, and sent as it is in every message."""
        return False

    @property
    def has_common_support(self) -> bool:
        """Whether the messages of all ranks hold the same entries in each step, so that `summable` can be added up."""
        return False

    @property
    def leaves_out_same_entries(self) -> bool:
        """Whether all ranks leave out the same entries in the same step."""
        return False

    @property
    def reads_any_strength(self) -> bool:
        """Whether it reads messages that were made with another ratio or threshold."""
        return True

    def summable(self, payload: Payload) -> Tensor:
        """Return the part of a message to add up over the ranks, (m,), if the support is common; the rest is equal."""
        return payload["values"]

    def with_sum(self, payload: Payload, total: Tensor) -> Payload:
        """Return a message with `total` (m,) in the place of its `summable`."""
        return {**payload, "values": total}

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> State:
        """Return the initial state for vectors of `spec`; different `stream`s give independent random numbers."""
        return None

    @abstractmethod
    def layout(self, spec: Spec) -> Layout:
        """Return the layout of this compressor's messages for the vectors of `spec`."""

    @abstractmethod
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Return the message Q(x) for `x` (n,); changes only `state`."""

    @abstractmethod
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * Q(x)`` to `out` (n,), where `payload` is the message of some rank."""

    @timed("compress")
    def compress_difference_(self, x: Tensor, x_hat: Tensor, spec: Spec, state: State, scratch: Tensor) -> Payload:
        """Return the message ``q = Q(x - x_hat)`` and add it to the public copy: ``x_hat += q``.

        All are (n,). The content of `scratch` is lost; the message may be a view of it.
        """
        payload = self.compress(torch.sub(x, x_hat, out=scratch), spec, state)
        self.accumulate(payload, spec, x_hat)
        return payload

    def rehearse(self, x: Tensor, spec: Spec) -> None:
        """Compress `x` (n,) and add the message, without using the result, so that kernels are loaded before timing."""
        out = torch.zeros_like(x)
        payload = self.compress_difference_(x, out, spec, self.init(spec, x.device), torch.empty_like(x))
        self.accumulate(payload, spec, out)

    def decompress(self, payload: Payload, spec: Spec) -> Tensor:
        """Return Q(x) as a new vector (n,)."""
        out = torch.zeros(spec.numel, dtype=spec.dtype, device=[*payload.values()][-1].device)
        self.accumulate(payload, spec, out)
        return out


@dataclass(frozen=True)
class Wrapper(Compressor):
    """A compressor around another one. The inner compressor answers whatever a subclass does not override.

    Attributes:
        inner: the other one.

    """

    inner: Compressor

    @property
    def is_unbiased(self) -> bool:
        """See `Compressor.is_unbiased`; the inner compressor answers."""
        return self.inner.is_unbiased

    @property
    def is_contractive(self) -> bool:
        """See `Compressor.is_contractive`; the inner compressor answers."""
        return self.inner.is_contractive

    @property
    def amplifies(self) -> bool:
        """See `Compressor.amplifies`; the inner compressor answers."""
        return self.inner.amplifies

    @property
    def relative_error(self) -> float:
        """See `Compressor.relative_error`; the inner compressor answers."""
        return self.inner.relative_error

    @property
    def remembers_errors(self) -> bool:
        """See `Compressor.remembers_errors`; the inner compressor answers."""
        return self.inner.remembers_errors

    def exempts(self, part: Spec) -> bool:
        """See `Compressor.exempts`; the inner compressor answers."""
        return self.inner.exempts(part)

    @property
    def has_common_support(self) -> bool:
        """See `Compressor.has_common_support`; the inner compressor answers."""
        return self.inner.has_common_support

    @property
    def leaves_out_same_entries(self) -> bool:
        """See `Compressor.leaves_out_same_entries`; the inner compressor answers."""
        return self.inner.leaves_out_same_entries

    @property
    def reads_any_strength(self) -> bool:
        """See `Compressor.reads_any_strength`; the inner compressor answers."""
        return self.inner.reads_any_strength

    def summable(self, payload: Payload) -> Tensor:
        """See `Compressor.summable`; the inner compressor answers."""
        return self.inner.summable(payload)

    def with_sum(self, payload: Payload, total: Tensor) -> Payload:
        """See `Compressor.with_sum`; the inner compressor answers."""
        return self.inner.with_sum(payload, total)

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> State:
        """See `Compressor.init`; the inner compressor answers."""
        return self.inner.init(spec, device, stream)

    def layout(self, spec: Spec) -> Layout:
        """See `Compressor.layout`; the inner compressor answers."""
        return self.inner.layout(spec)

    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """See `Compressor.compress`; the inner compressor answers."""
        return self.inner.compress(x, spec, state)

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """See `Compressor.accumulate`; the inner compressor answers."""
        self.inner.accumulate(payload, spec, out, weight)
