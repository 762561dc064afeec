"""What the methods of Adam's kind share that take their steps by themselves.

The optimizer is `torch.optim.SGD` without momentum. Of it they use the learning rate of each group, and its weight
decay, which is decoupled as in AdamW: ``x = x (1 - lr weight_decay)``. The step is

    lr sqrt(1 - beta2^s) / (1 - beta1^t) m / (sqrt(v) + epsilon sqrt(1 - beta2^s))

with m and v (n,) the moments, made of t and s gradients: Adam's, corrected for moments that start at zero. Without
``bias_correction`` it is ``lr m / (sqrt(v) + epsilon)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpicomp.algorithms.base import Algorithm, Local, S, require_fraction, require_positive
from mpicomp.algorithms.sums.base import require_minimizing, require_sgd
from mpicomp.compression.base import blocks
from mpicomp.errors import ConfigError
from mpicomp.kernels.reference import sqrt


@dataclass(frozen=True, kw_only=True)
class OwnAdam(Algorithm[S]):
    """A method that takes steps of Adam's kind by itself, with the learning rates of the optimizer's groups.

    Attributes:
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the second moment.
        bias_correction: whether the moments are corrected for their start at zero, as in `torch.optim.Adam`.

    """

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        require_fraction(beta1=self.beta1, beta2=self.beta2)
        require_positive(epsilon=self.epsilon)

    def require_plain_optimizer(self, local: Local) -> None:
        """Raise ConfigError unless the optimizer is SGD, without momentum and `maximize`, which would do nothing."""
        require_sgd(self.name, local)
        if local.momentum:
            raise ConfigError(
                f"optimizer.momentum = {local.momentum:g}: {self.name} takes its steps by itself, and of the optimizer "
                "only the learning rates and the weight decay. Set it to 0; the method's own are algorithm.beta1 and "
                "algorithm.beta2."
            )
        require_minimizing(self.name, local)

    def corrections(self, of_m: int, of_v: int) -> tuple[float, float]:
        """Return what to divide m and sqrt(v) by, moments of so many gradients; 1 without bias correction."""
        return (1 - self.beta1**of_m, (1 - self.beta2**of_v) ** 0.5) if self.bias_correction else (1.0, 1.0)

    def steps_of_(self, m: Tensor, v: Tensor, local: Local, steps: tuple[int, int], scale: float = 1.0) -> None:
        """``g = scale lr m / (sqrt(v) + epsilon)``, all (n,), corrected for moments of `steps` (of m, of v) gradients.

        lr is that of each parameter's group.
        """
        first, root = self.corrections(*steps)
        for part, group in local.groups:
            lr, epsilon = scale * group["lr"] * root / first, self.epsilon * root
            for start, stop in blocks(part.stop - part.start):
                block = slice(part.start + start, part.start + stop)
                root_of_v = sqrt(v[block]).add_(epsilon)
                torch.mul(torch.div(m[block], root_of_v, out=root_of_v), lr, out=local.g[block])

    def decay_(self, local: Local, scale: float = 1.0) -> None:
        """``x = x (1 - scale lr weight_decay)``, with those of each parameter's group."""
        for part, group in local.groups:
            if weight_decay := group.get("weight_decay", 0.0):
                local.x[part].mul_(1 - scale * group["lr"] * weight_decay)

    def tell_optimizer(self, local: Local) -> None:
        """Have the optimizer step on nothing, so that its hooks run and schedulers see that it has been called."""
        local.update(slice(0, 0))


def zero_moments(local: Local) -> tuple[Tensor, Tensor]:
    """Return m and v at the start, (n,)."""
    return torch.zeros_like(local.x), torch.zeros_like(local.x)


def moments_(m: Tensor, v: Tensor, g: Tensor, beta1: float, beta2: float) -> None:
    """``m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g g``, all (n,)."""
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
