"""The definition of every operation in plain torch; other versions are tested against these."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_indices(x: Tensor, k: int) -> Tensor:
    """Return the indices (k,) int32, ascending, of the `k` entries of `x` (n,) largest in magnitude; ties by lowest index."""
    magnitude = x.abs()
    threshold = magnitude.topk(k, sorted=False).values.min()
    above = (magnitude > threshold).nonzero().flatten()
    ties = (magnitude == threshold).nonzero().flatten()[: k - len(above)]
    return torch.cat([above, ties]).sort().values.int()
