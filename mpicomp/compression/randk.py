"""Random-k: entries chosen uniformly without replacement.

``Q(x)_i = scale x_i`` for k random i, else 0, with ``k = max(1, floor(ratio n))``. ``scale = 1`` is contractive with
delta = k/n; ``scale = n/k`` is unbiased with variance ``(n/k - 1) |x|^2``. No index travels: the receiver draws the
same ones from the seed in the message. Bytes: k values and 8. Stich et al. 2018, arXiv 1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp import kernels
from mpicomp.compression.base import Compressor
from mpicomp.compression.message import Field, Layout, Payload, Spec, index_dtype
from mpicomp.compression.random import Draws, mix64
from mpicomp.compression.ratio import check_ratio, kept
from mpicomp.kernels.reference import number
from mpicomp.timing import timed

SHORT = 64
"""Up to this length the permutation favors some entries, so the choice is turned around by a random step."""

_ODD = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class RandomK(Compressor):
    """Keep random entries.

    Attributes:
        ratio: the fraction of the entries that is kept, in (0, 1].
        shared: whether all ranks choose the same entries in the same step.
        unbiased: whether values are scaled by n/k.
        seed: of the choice.

    """

    ratio: float
    shared: bool = True
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    @property
    def is_unbiased(self) -> bool:
        """Whether the values are scaled."""
        return self.unbiased

    @property
    def is_contractive(self) -> bool:
        """Whether the values are left as they are."""
        return not self.unbiased

    @property
    def leaves_out_same_entries(self) -> bool:
        """Whether the choice is shared."""
        return self.shared

    def init(self, spec: Spec, device: torch.device, stream: int = 0) -> Draws:
        """Return the start of this rank's random stream, or of the one that all ranks share."""
        return Draws(0 if self.shared else mix64(1, stream))

    def layout(self, spec: Spec) -> Layout:
        """Return the fields ``seed`` (1,) and ``values`` (k,); raise ValueError for a vector beyond 32-bit indices."""
        index_dtype(spec.numel)
        return Layout((Field("seed", torch.int64, 1), Field("values", spec.dtype, kept(spec.numel, self.ratio))))

    @timed("compress")
    def compress(self, x: Tensor, spec: Spec, state: Draws) -> Payload:
        """Draw the seed of this message and gather the entries that it selects."""
        seed = number(mix64(self.seed, state.step, state.stream) >> 1, torch.int64, x.device)
        state.step += 1
        k = kept(spec.numel, self.ratio)
        values = x[_indices(seed, spec.numel, k)]
        if self.unbiased and k:
            values *= spec.numel / k
        return {"seed": seed, "values": values}

    @timed("compress")
    def accumulate(self, payload: Payload, spec: Spec, out: Tensor, weight: float = 1.0) -> None:
        """Draw the indices again from the seed and compute ``out[indices] += weight * values``."""
        values = payload["values"]
        kernels.scatter_add_(out, _indices(payload["seed"], spec.numel, len(values)), values, weight)


def _indices(seed: Tensor, n: int, k: int) -> Tensor:
    """Return `k` different indices below `n`, each equally likely."""
    indices = kernels.random_indices(seed, n, k)
    if not 0 < n <= SHORT:
        return indices
    turn = (seed * _ODD >> 32 & 0x7FFFFFFF) % n
    return ((indices + turn) % n).to(indices.dtype)
