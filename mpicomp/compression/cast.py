"""Cast: every entry in half precision.

``Q(x) = x`` rounded to float16 (11 significant bits, up to 65504) or bfloat16 (8 bits, the range of float32). Values
beyond the range saturate at the largest finite one. Contractive in the normal range, with ``1 - delta`` of 2**-22 or
2**-16. Bytes: ``2 n``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpicomp.compression.base import Compressor, blocks
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.values import saturated
from mpicomp.errors import ConfigError
from mpicomp.state import State
from mpicomp.timing import timed

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Cast(Compressor):
    """Round to 16 bits.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``.

    """

    dtype: Literal["float16", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"compression.dtype = {self.dtype!r} must be 'float16' or 'bfloat16'")

    @property
    def relative_error(self) -> float:
        """The rounding error: half a unit in the last place."""
        return torch.finfo(_DTYPES[self.dtype]).eps / 2

    def layout(self, spec: Spec) -> Layout:
        """Return the field ``values`` (n,)."""
        return Layout((Field("values", _DTYPES[self.dtype], spec.numel, must_be="finite"),))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: State) -> Payload:
        """Round each entry; those out of range become the largest finite value."""
        return {"values": saturated(x, _DTYPES[self.dtype])}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Compute ``out += weight * values``."""
        for start, stop in blocks(spec.numel):
            out[start:stop].add_(payload["values"][start:stop].to(out.dtype), alpha=weight)
