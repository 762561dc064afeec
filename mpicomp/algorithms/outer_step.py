"""The outer step of methods with a slow model: momentum on the mean of what the ranks have moved."""

from __future__ import annotations

from torch import Tensor


def outer_step_(phi: Tensor, v: Tensor | None, d: Tensor, lr: float, momentum: float, nesterov: bool) -> None:
    """``v = beta v + d;  phi = phi - eta (d + beta v)`` (Nesterov's), or ``phi = phi - eta v``; all (n,), in place.

    Args:
        phi: the slow model.
        v: the momentum; None for ``phi = phi - eta d``.
        d: the pseudo-gradient, the mean over the ranks; used up.
        lr: eta.
        momentum: beta.
        nesterov: whether the step looks ahead along the momentum.

    """
    if v is not None:
        v.mul_(momentum).add_(d)
        d = d.add_(v, alpha=momentum) if nesterov else v
    phi.sub_(d, alpha=lr)
