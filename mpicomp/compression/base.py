"""WHAT is sent: a compressor turns a flat vector into a few named tensors, and adds such a message to a vector.

Messages are those of `mpicomp.compression.message`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

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
    def has_common_support(self) -> bool:
        """Whether ``values`` of all ranks' messages belong to the same entries in each step, and so can be added up."""
        return False

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
