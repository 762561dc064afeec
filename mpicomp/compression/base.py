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

    Subclasses are frozen dataclasses of hyper-parameters and final. What changes from step to step lives in the state
    that `init` makes and `compress` changes in place; where there is none the state is None.
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
        """Whether all ranks' messages are of the same entries in each step, so that `summable` can be added up."""
        return False

    def summable(self, payload: Payload) -> Tensor:
        """Return what of a message of common support is added up over the ranks, (m,); the rest is the same on all."""
        return payload["values"]

    def with_sum(self, payload: Payload, total: Tensor) -> Payload:
        """Return a message of common support with `total` (m,) for its `summable`."""
        return {**payload, "values": total}

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> State:
        """Return the initial state for the vectors of `spec`; random ones of different `stream`s are independent."""
        return None

    @abstractmethod
    def layout(self, spec: Spec) -> Layout:
        """Return the layout of this compressor's messages for the vectors of `spec`."""

    @abstractmethod
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Return the message Q(x) for `x` (n,), which is left as it is; only `state` changes."""

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
        """Compress `x` (n,) and add the message once, for nothing: kernels are then loaded before a clock runs."""
        out = torch.zeros_like(x)
        payload = self.compress_difference_(x, out, spec, self.init(spec, x.device), torch.empty_like(x))
        self.accumulate(payload, spec, out)

    def decompress(self, payload: Payload, spec: Spec) -> Tensor:
        """Return Q(x) as a new vector (n,)."""
        out = torch.zeros(spec.numel, dtype=spec.dtype, device=next(iter(payload.values())).device)
        self.accumulate(payload, spec, out)
        return out


@dataclass(frozen=True)
class Wrapper(Compressor):
    """A compressor around another one, which answers for it in all that a subclass does not say by itself.

    Attributes:
        inner: the other one.

    """

    inner: Compressor

    @property
    def is_unbiased(self) -> bool:
        """As the inner one."""
        return self.inner.is_unbiased

    @property
    def is_contractive(self) -> bool:
        """As the inner one."""
        return self.inner.is_contractive

    @property
    def relative_error(self) -> float:
        """As of the inner one."""
        return self.inner.relative_error

    @property
    def remembers_errors(self) -> bool:
        """As the inner one."""
        return self.inner.remembers_errors

    def exempts(self, part: Spec) -> bool:
        """As the inner one."""
        return self.inner.exempts(part)

    @property
    def has_common_support(self) -> bool:
        """As the inner one."""
        return self.inner.has_common_support

    def summable(self, payload: Payload) -> Tensor:
        """As the inner one."""
        return self.inner.summable(payload)

    def with_sum(self, payload: Payload, total: Tensor) -> Payload:
        """As the inner one."""
        return self.inner.with_sum(payload, total)

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> State:
        """Return the state of the inner one."""
        return self.inner.init(spec, device, stream)

    def layout(self, spec: Spec) -> Layout:
        """Return the inner layout."""
        return self.inner.layout(spec)

    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """As the inner one."""
        return self.inner.compress(x, spec, state)

    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """As the inner one."""
        self.inner.accumulate(payload, spec, out, weight)
