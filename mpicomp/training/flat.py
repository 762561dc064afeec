"""The model of a rank as one flat vector of parameters and one of gradients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpicomp.compression.base import Spec
from mpicomp.errors import ConfigError
from mpicomp.timing import timed
from mpicomp.training.pace import Pace


class FlatModel:
    """A `torch.nn.Module` and its optimizer, seen as the flat vectors that algorithms work on (a `Local`).

    Parameters and their gradients become views of two flat buffers, so that no message and no arithmetic of an
    algorithm goes parameter by parameter. Any `torch.optim` optimizer goes on working on the parameters.

    Attributes:
        x: (n,) the trainable parameters, in the order of ``model.named_parameters()``.
        g: (n,) their gradients.
        spec: names and shapes of the tensors in `x`.
        closure: computes the loss of the next batch, a scalar with a graph.
        loss: the loss of the last `gradient`, detached, on the device.
        pace: how long each gradient takes.

    Raises:
        ConfigError: a model without trainable parameters, or with trainable parameters of several types.

    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        types = {(p.dtype, p.device) for _, p in named}
        if len(types) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in types)) or "none"
            raise ConfigError(f"the model's trainable parameters must be of one type on one device, not: {found}")
        self.model = model
        self.optimizer = optimizer
        self.spec = Spec(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named), types.pop()[0])
        self.x = torch.cat([p.detach().reshape(-1) for _, p in named])
        self.g = torch.zeros_like(self.x)
        self.closure: Callable[[], Tensor] = _no_closure
        self.loss = torch.full((), torch.nan)
        self.pace = Pace()
        self._meanwhile: Callable[[], bool] | None = None
        self._is_hooked = False
        self._thread = 0
        self._parameters = [p for _, p in named]
        self._gradients = [g.view(shape) for g, shape in zip(self.spec.split(self.g), self.spec.shapes, strict=True)]
        for p, x, shape in zip(self._parameters, self.spec.split(self.x), self.spec.shapes, strict=True):
            p.data = x.view(shape)

    def not_finite(self) -> str | None:
        """Return the name of the first tensor with a NaN or an infinity in its parameters or gradients."""
        tensors = zip(self.spec.names, self.spec.split(self.x), self.spec.split(self.g), strict=True)
        return next((name for name, x, g in tensors if not (x.isfinite().all() and g.isfinite().all())), None)

    @property
    def lr(self) -> float:
        """The learning rate of the optimizer's first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def momentum(self) -> float:
        """The momentum of the optimizer's first group (the first decay rate of Adam and its kin), 0 without one."""
        group = self.optimizer.param_groups[0]
        return float(group.get("momentum", 0.0) or group.get("betas", (0.0,))[0])

    @property
    def weight_decay(self) -> float:
        """The largest weight decay of the optimizer's groups, 0 without one."""
        return max(float(group.get("weight_decay", 0.0)) for group in self.optimizer.param_groups)

    @timed("gradient")
    def gradient(self, meanwhile: Callable[[], bool] | None = None) -> Tensor:
        """Run `closure` and its backward pass; return the flat gradient (n,).

        `meanwhile` is called between the layers, until it returns true. On a GPU it is not during the backward pass,
        which runs in a thread of its own, far ahead of the device.
        """
        start = time.perf_counter()
        self.g.zero_()
        self._show_gradients(slice(0, self.spec.numel))
        self._meanwhile, self._thread = meanwhile, threading.get_ident()
        if meanwhile is not None and not self._is_hooked:
            self._hook()
        try:
            loss = self.closure()
            torch.autograd.backward(loss)
            self.loss = loss.detach()
            self.pace.keep(time.perf_counter() - start, self._meanwhile)
        finally:
            self._meanwhile = None
        return self.g

    @timed("gradient")
    def update(self, part: slice | None = None) -> None:
        """Take the optimizer's step; only on the tensors that `part` of the flat vector touches, if it is given."""
        if part is not None:
            self._show_gradients(part)
        self.optimizer.step()

    def _hook(self) -> None:
        """Have `_between_layers` called, from now on."""
        self._is_hooked = True
        for module in self.model.modules():
            if not list(module.children()):
                module.register_forward_hook(self._between_layers)
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._between_layers)  # type: ignore[no-untyped-call]

    def _between_layers(self, *_: object) -> None:
        if self._meanwhile is not None and threading.get_ident() == self._thread and self._meanwhile():
            self._meanwhile = None

    def _show_gradients(self, part: slice) -> None:
        """Give the parameters their views again: zero_grad() of torch.optim drops them."""
        offset = 0
        for p, g in zip(self._parameters, self._gradients, strict=True):
            p.grad = g if offset < part.stop and part.start < offset + g.numel() else None
            offset += g.numel()

    def buffers(self) -> list[Tensor]:
        """Return the floating-point buffers (batch-norm statistics), which may be averaged; counters may not."""
        return [b for b in self.model.buffers() if b.is_floating_point()]

    def snapshot(self) -> Snapshot:
        """Return a copy of the parameters and buffers, for `restore_`."""
        return Snapshot(self.x.clone(), [b.clone() for b in self.buffers()])

    def restore_(self, snapshot: Snapshot) -> None:
        """Overwrite the parameters and buffers by those of `snapshot`."""
        self.x.copy_(snapshot.x)
        for buffer, stored in zip(self.buffers(), snapshot.buffers, strict=True):
            buffer.copy_(stored)


@dataclass(frozen=True)
class Snapshot:
    """The parameters (n,) and the floating-point buffers of a model."""

    x: Tensor
    buffers: list[Tensor]


def _no_closure() -> Tensor:
    raise AssertionError("set FlatModel.closure before the first gradient")
