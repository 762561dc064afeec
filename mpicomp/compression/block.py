"""Random block (RBGS): one contiguous block of the vector, the same on all ranks.

The vector is cut into ``B = max(1, round(1 / ratio))`` blocks of ``ceil(n / B)`` entries, the last ones shorter; step
t draws one of them from (seed, t). Contractive in expectation with delta = 1/B. No index travels, nothing is
searched, and the support is common, so that messages can be summed by an all-reduce. Needs error feedback. Bytes:
``ceil(n / B)`` values and 8. The idea: arXiv 2004.05298; how blocks are drawn is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec
from mpicomp.compression.random import Draws, mix64
from mpicomp.compression.ratio import check_ratio
from mpicomp.kernels import reference
from mpicomp.kernels.reference import number
from mpicomp.timing import timed


@dataclass(frozen=True)
class RandomBlock(Compressor):
    """Keep a random block.

    Attributes:
        ratio: the fraction of the entries in a block, in (0, 1].
        seed: of the choice.

    """

    ratio: float
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def leaves_out_same_entries(self) -> bool:
        """Yes: the block of a step is the same on all ranks."""
        return True

    @property
    def has_common_support(self) -> bool:
        """True: every message holds the block of its step."""
        return True

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of the random stream that all ranks share."""
        return Draws(0)

    def _blocks(self, n: int) -> tuple[int, int]:
        """Return the length of a block, and how many there are."""
        length = -(-n // max(1, round(1 / self.ratio)))
        return length, -(-n // length) if n else 0

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``offset`` (1,) and ``values``, at most one block."""
        length, _ = self._blocks(spec.numel)
        return Layout((Field("offset", torch.int32, 1), Field("values", spec.dtype, length, variable=True)))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Return the block of this step, as a view of `x`."""
        length, count = self._blocks(spec.numel)
        offset = length * (mix64(self.seed, state.step) % count) if count else 0
        state.step += 1
        values = x[offset : offset + length]
        return {"offset": number(offset, torch.int32, x.device), "values": values}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Add ``weight * values`` to the block of `out` that the message names."""
        add = reference.add_block_ if out.is_cpu else kernels.add_block_  # the choice among versions takes longer
        add(out, payload["offset"], payload["values"], weight)
