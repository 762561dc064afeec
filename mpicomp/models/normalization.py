"""Normalization with activation, as convolutional networks repeat it: batch, group or EvoNorm-S0.

Batch normalization keeps running statistics in buffers, each rank its own in training; `Replica.averaged` averages
them, and `distribute(..., buffers=N)` every N steps. The other two have no state beyond their parameters and treat each
sample by itself, which suits small or skewed batches.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mpicomp.data.arguments import require_positive
from mpicomp.errors import ConfigError

Norm = Literal["none", "batch", "group", "evonorm"]
NORMS: tuple[Norm, ...] = ("none", "batch", "group", "evonorm")


class EvoNormS0(nn.Module):
    """EvoNorm-S0: ``y = gamma * x * sigmoid(v * x) / sqrt(var(x) + eps) + beta``.

    ``var`` is taken within each sample over the pixels and channels of a group; `v`, `gamma` and `beta` are learned,
    one per channel. It stands for normalization and activation together.

    Liu et al. 2020, "Evolving Normalization-Activation Layers", arXiv 2004.02967, table 2.

    Shape:
        (b, C, H, W) -> (b, C, H, W)

    """

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations (b, C, H, W)."""
        gamma, beta, v = (p.view(1, -1, 1, 1) for p in (self.gamma, self.beta, self.v))
        grouped = x.reshape(len(x), self.groups, -1)
        scale = torch.rsqrt(grouped.var(dim=2, unbiased=False, keepdim=True) + self.eps)
        return ((x * torch.sigmoid(v * x)).reshape_as(grouped) * scale).reshape_as(x) * gamma + beta


def require_norm(norm: str, groups: int, narrowest: int) -> None:
    """Check the choice of a normalization for layers whose channels are multiples of `narrowest`.

    Raises:
        ConfigError: an unknown norm, or groups of unequal size.

    """
    if norm not in NORMS:
        raise ConfigError(f"model.norm = {norm!r} is unknown. Known: {', '.join(NORMS)}.")
    require_positive("model", groups=groups)
    if narrowest % groups:
        raise ConfigError(f"model.groups = {groups}: must divide the {narrowest} channels of the narrowest layer.")


def normalize(norm: Norm, channels: int, groups: int) -> nn.Module:
    """Return the normalization alone; EvoNorm-S0 has its activation inside."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(groups, channels)
    return EvoNormS0(channels, groups) if norm == "evonorm" else nn.Identity()


def activate(norm: Norm) -> nn.Module:
    """Return the activation that follows `normalize`: ReLU, or nothing after EvoNorm-S0."""
    return nn.Identity() if norm == "evonorm" else nn.ReLU()
