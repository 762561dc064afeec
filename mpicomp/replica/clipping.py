"""Clipping of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mpicomp.errors import ConfigError


@dataclass(frozen=True)
class Clip:
    """Limits for gradients.

        norm:   g = g min(1, norm / (|g|_2 + 1e-6))       as `torch.nn.utils.clip_grad_norm_`
        value:  g = max(-value, min(g, value))            elementwise, as `clip_grad_value_`; after `norm`

    Gossip methods clip the gradient of a rank before its local step. Methods that sum gradients clip each rank's before
    it is compressed, so that a single rank cannot send a larger one. With `after_sum` they clip the sum instead, as a
    script with `DistributedDataParallel` does.

    Attributes:
        norm: the largest Euclidean norm of the whole gradient (n,), > 0; None for no limit.
        value: the largest absolute value of an entry, > 0; None for no limit.
        after_sum: whether the sum over ranks is clipped instead of each rank's gradient.

    Raises:
        ConfigError: neither limit is given, or one is not positive.

    """

    norm: float | None = None
    value: float | None = None
    after_sum: bool = False

    def __post_init__(self) -> None:
        limits = {"norm": self.norm, "value": self.value}
        for key, limit in limits.items():
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"Clip({key}={limit}): must be a finite number > 0")
        if limits == {"norm": None, "value": None}:
            raise ConfigError("Clip() clips nothing: give norm or value, e.g. mpicomp.Clip(norm=1.0)")

    def __call__(self, g: Tensor) -> None:
        """Clip `g` (n,) in place, without waiting for the device."""
        if self.norm is not None:
            g.mul_((self.norm / (g.norm() + 1e-6)).clamp_(max=1.0))
        if self.value is not None:
            g.clamp_(-self.value, self.value)
