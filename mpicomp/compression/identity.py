"""Identity: the vector as it is.

``Q(x) = x``. Bytes: ``n * itemsize``. Unbiased, and contractive with delta = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.state import State
from mpicomp.timing import timed


@dataclass(frozen=True)
class Identity(Compressor):
    """Send the vector without compression."""

    @property
    def is_unbiased(self) -> bool:
        """True, because Q(x) = x."""
        return True

    @property
    def relative_error(self) -> float:
        """0, because Q(x) = x."""
        return 0.0

    @property
    def has_common_support(self) -> bool:
        """True: every message holds all entries."""
        return True

    def layout(self, spec: Spec) -> Layout:
        """Return the field ``values`` (n,)."""
        return Layout((Field("values", spec.dtype, spec.numel),))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Return `x` itself, not a copy."""
        return {"values": x}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * values``."""
        out.add_(payload["values"], alpha=weight)
