"""Error feedback: what one message leaves out is added to the next.

    p = x + e;  send Q(p);  e = p - Q(p)

so that ``sum of all sent + e = sum of all x``. It makes contractive compressors usable on gradients. Memory: one
vector, e, in which the sum is formed. Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpicomp.compression.base import Wrapper
from mpicomp.compression.message import Payload, Spec
from mpicomp.state import ERROR_OF_GRADIENTS, State
from mpicomp.timing import timed


@dataclass
class FeedbackState:
    """The state of `ErrorFeedback` on one rank.

    Attributes:
        residual: (n,) what has not been sent so far.
        inner: state of the inner compressor.

    """

    residual: Tensor = field(metadata=ERROR_OF_GRADIENTS)
    inner: State


@dataclass(frozen=True)
class ErrorFeedback(Wrapper):
    """Remember the error of a compressor.

    Attributes:
        inner: the compressor; its messages are sent.

    """

    @property
    def is_unbiased(self) -> bool:
        """False: a message also carries the error of earlier ones."""
        return False

    @property
    def is_contractive(self) -> bool:
        """False: a message also carries the error of earlier ones."""
        return False

    @property
    def amplifies(self) -> bool:
        """True: a message also carries the error of earlier ones."""
        return True

    @property
    def relative_error(self) -> float:
        """Infinite: the error of a single message has no bound."""
        return math.inf

    @property
    def remembers_errors(self) -> bool:
        """True: the residual holds what earlier messages left out."""
        return True

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> FeedbackState:
        """Return a state without residual error."""
        residual = torch.zeros(spec.numel, dtype=spec.dtype, device=device)
        return FeedbackState(residual, self.inner.init(spec, device, stream))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: FeedbackState) -> Payload:
        """Compress the sum of `x` and the residual, and keep what is left."""
        self.add_(x, state)
        return self.compress_sum(spec, state)

    @timed("compress")
    def add_(self, x: Tensor, state: FeedbackState) -> None:
        """Add `x` (n,) to the residual: the first half of `compress`."""
        state.residual.add_(x)

    @timed("compress")
    def compress_sum(self, spec: Spec, state: FeedbackState) -> Payload:
        """Compress the residual, and keep what was not sent: the second half of `compress`."""
        payload = apart_from(state.residual, self.inner.compress(state.residual, spec, state.inner))
        self.inner.accumulate(payload, spec, state.residual, -1.0)
        return payload


def apart_from(x: Tensor, payload: Payload) -> Payload:
    """Return the message, copied where it is a view of `x` (identity, block), so that `x` may change afterwards."""
    return {name: tensor.clone() if _overlaps(tensor, x) else tensor for name, tensor in payload.items()}


def _overlaps(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
