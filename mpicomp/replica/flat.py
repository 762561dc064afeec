"""The model of a rank as one flat vector of parameters and one of gradients."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mpicomp.algorithms.base import Meanwhile
from mpicomp.compression.message import Spec
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.replica.buffers import own_buffers
from mpicomp.replica.closure import finish_backward
from mpicomp.replica.gradient_delay import GradientDelay
from mpicomp.replica.held_parameters import HeldParameters
from mpicomp.replica.hooks import Hook, hook_layers
from mpicomp.replica.model_checks import listed, trained_parameters
from mpicomp.replica.several_optimizers import singles
from mpicomp.timing import timed

FINITE_EVERY = 50
"""Steps from one look whether the parameters are finite to the next; a step by closure also looks at its loss."""

_registered: Any = WeakIdKeyDictionary()
"""The parameters of all distributed models, each with a weak reference to its flat model."""


def flat_model_of(parameter: Tensor) -> FlatModel | None:
    """Return the flat model to which a parameter belongs; None if it is not trained by a distributed step."""
    return _registered[parameter]() if parameter in _registered else None


Frozen = dict[int, Tensor]
"""Values of frozen parameters, by their number in the flat model."""


class FlatModel:
    """A `torch.nn.Module` and its optimizer, seen as the flat vectors that algorithms work on (a `Local`).

    Parameters and their gradients become views of two flat buffers, so that messages and arithmetic of an algorithm
    need not go parameter by parameter. The optimizer continues to work on the parameters. The buffers have the widest
    type of the parameters, and float32 at least: public copies, error memories and moments are sums of many small
    numbers, which half precision would round away. A parameter of a shorter type is kept equal to its part of `x`,
    rounded.

    A frozen parameter (``requires_grad`` is false) does not change; it may be thawed later.

    Attributes:
        x: (n,) the parameters that the optimizer holds, in the order of ``model.named_parameters()``.
        g: (n,) their gradients.
        spec: names and shapes of the tensors in `x`.
        dtypes: of the parameters.
        closure: computes the loss of the next batch, a scalar.
        micro_batches: how often `gradient` calls `closure`; its gradient is the mean.
        clip: changes `g` when it has been computed; None for no change.
        clip_sum: changes `g` before the optimizer's step; None for no change.
        skips_update: whether `update` does nothing.
        skips_absent: whether `update` leaves parameters alone that had no gradient, as `torch.optim` does.
        is_averaged: whether the model is the mean over the ranks for now, see `Replica.averaged`.
        loss: the mean loss of the last `gradient`, detached, on the device.
        has_loss: whether the loss is known; a closure may return None.
        delay: how long each gradient takes.

    Raises:
        ConfigError: model and optimizer do not fit together (see `trained_parameters`).

    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        named = trained_parameters(model, optimizer)
        if taken := [name for name, p in named if p in _registered]:
            raise ConfigError(
                f"the model is distributed already: {listed(taken)}. For another training, distribute "
                "copy.deepcopy(model), with an optimizer of its own"
            )
        self.model = model
        self.optimizer = optimizer
        dtype = reduce(torch.promote_types, (p.dtype for _, p in named), torch.float32)
        self.spec = Spec(tuple(n for n, _ in named), tuple(tuple(p.shape) for _, p in named), dtype)
        self.x = torch.cat([p.detach().reshape(-1).to(dtype) for _, p in named])
        self.g = torch.zeros_like(self.x)
        self.closure: Callable[[], Tensor | None] = _no_closure
        self.micro_batches = 1
        self.clip: Callable[[Tensor], None] | None = None
        self.clip_sum: Callable[[Tensor], None] | None = None
        self.skips_update = False
        self.skips_absent = False
        self.is_averaged = False
        self.loss = torch.full((), torch.nan)
        self.has_loss = False
        self.delay = GradientDelay()
        self._meanwhile: Meanwhile = None
        self._is_hooked = False
        self._is_updating = False
        self._thread = 0
        self._steps = 0
        self._anchored = ""
        self._loaded_over: Tensor | None = None
        self._parameters = [p for _, p in named]
        self._with_gradient: set[Tensor] = set()
        self._has_backward = False  # a backward pass since the last step
        self._shown: list[Tensor | None] = [None] * len(named)
        self._values = [x.view(shape) for x, shape in zip(self.spec.split(self.x), self.spec.shapes, strict=True)]
        self._gradients = [g.view(shape) for g, shape in zip(self.spec.split(self.g), self.spec.shapes, strict=True)]
        self._places = [g.data_ptr() for g in self._gradients]
        self.dtypes = [p.dtype for p in self._parameters]
        self._copies = [i for i, p in enumerate(self._parameters) if p.dtype != dtype]
        for p, x in zip(self._parameters, self._values, strict=True):
            if p.dtype == dtype:
                p.data = x
        self._unhooked = list(self._parameters)
        self._hook_gradients()
        self._pointers = [p.data_ptr() for p in self._parameters]
        self._held = HeldParameters(model, optimizer, named)
        own_buffers(model)

    def register(self) -> None:
        """Register the parameters: another `FlatModel` refuses them, and so do steps of other optimizers."""
        _registered.update((p, weakref.ref(self)) for p in self._parameters)

    def not_finite(self) -> str | None:
        """Return the name of the first tensor with a NaN or an infinity in its parameters or gradients."""
        tensors = zip(self.spec.names, self.spec.split(self.x), self.spec.split(self.g), strict=True)
        return next((name for name, x, g in tensors if not (x.isfinite().all() and g.isfinite().all())), None)

    @property
    def lr(self) -> float:
        """The learning rate of the optimizer's first group, for reports."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def groups(self) -> list[tuple[slice, dict[str, Any]]]:
        """The parts of `x`, in order, each with the optimizer's group to which it belongs."""
        return [(part, self.optimizer.param_groups[group]) for part, group in self._held.parts]

    @property
    def momentum(self) -> float:
        """The largest momentum of the optimizer's groups (the first decay rate of Adam and its kin), 0 without one."""
        groups = self.optimizer.param_groups
        return max(float(group.get("momentum", 0.0) or group.get("betas", (0.0,))[0]) for group in groups)

    @property
    def optimizer_classes(self) -> list[type[torch.optim.Optimizer]]:
        """The class of the optimizer, or of each if there are several."""
        return [type(each) for each in singles(self.optimizer)]

    @property
    def is_elsewhere(self) -> bool:
        """Whether parameters have other memory than their own (``p.data = ...``)."""
        return [p.data_ptr() for p in self._parameters] != self._pointers

    @property
    def is_updating(self) -> bool:
        """Whether `update` is running the optimizer's step."""
        return self._is_updating

    def norm(self, x: Tensor) -> Tensor:
        """Return the Euclidean norm of `x` (n,)."""
        norm: Tensor = x.norm()
        return norm

    @timed("gradient")
    def gradient(self, meanwhile: Meanwhile = None) -> Tensor:
        """Run `closure`, and the backward pass unless the closure has run it; return the flat gradient (n,).

        `meanwhile` is called between layers until it returns true. On a GPU it is not called during the backward pass,
        which runs in a thread of its own, far ahead of the device.
        """
        start = time.perf_counter()
        self.listen(meanwhile)
        try:
            self.loss = self._micro_batch()
            if self.micro_batches > 1:
                # One sum beside the gradients: a closure may call zero_grad().
                total = self.g.clone()
                for _ in range(self.micro_batches - 1):
                    self.loss = self.loss + self._micro_batch()
                    total.add_(self.g)
                torch.div(total, self.micro_batches, out=self.g)
                self.loss = self.loss / self.micro_batches
            self.delay.keep(time.perf_counter() - start, self._meanwhile)
        finally:
            self._meanwhile = None
        self._clip()
        return self.g

    def take_gradients(self, scale: Tensor | None = None) -> Tensor:
        """Return the flat gradient (n,) of the caller's backward passes, divided by `scale`."""
        self._meanwhile = None
        self._collect()
        if scale is not None:
            self.g.mul_(scale.double().reciprocal().to(self.g))  # as `GradScaler.unscale_` does, to the bit
        self._clip()
        return self.g

    def listen(self, meanwhile: Meanwhile) -> None:
        """Call `meanwhile` between the layers of the following passes, until it returns true."""
        self._meanwhile, self._thread = meanwhile, threading.get_ident()
        if meanwhile is not None and not self._is_hooked:
            self._is_hooked = True
            hook_layers(self.model, self._between_layers)

    @timed("gradient")
    def update(self, part: slice | None = None) -> None:
        """Run the optimizer's step; if `part` is given, only on tensors that overlap this part of the flat vector."""
        if self.skips_update:
            return
        if self.clip_sum is not None:
            self.clip_sum(self.g)
        self.show_parameters()  # an algorithm may have mixed `x` since the gradient, and the step is made on parameters
        self._show_gradients(part or slice(0, self.spec.numel), self.skips_absent)
        self._is_updating = True
        try:
            self.optimizer.step()
        finally:
            self._is_updating = False
        self._take_written()

    def zero_grad(self) -> None:
        """Set all gradients to zero in place."""
        self.g.zero_()
        self._with_gradient.clear()
        self.forget_gradients()
        self._renew_views()
        self._show_gradients(slice(0, self.spec.numel))

    def show_parameters(self) -> None:
        """Copy `x`, rounded, to parameters of another type, because they do not share memory with it."""
        _copy([self._parameters[i].data for i in self._copies], [self._values[i] for i in self._copies])
        self._read_parameters()

    def end_step(self) -> None:
        """Make all parameters equal to `x` again, and their gradients to `g`, after an algorithm's step."""
        self.show_parameters()
        self._show_gradients(slice(0, self.spec.numel))
        for p in self._parameters:  # changes of `x` are none of theirs to autograd: it would accept a graph from before
            torch.autograd.graph.increment_version(p)
        self.forget_gradients()
        self._steps += 1

    @property
    def has_gradients(self) -> bool:
        """Whether backward passes since the last step have left gradients for the next one; waits for the device."""
        gradients = (p.grad for p in self._parameters if p.grad is not None) if self._has_backward else ()
        return any(grad.is_sparse or bool(grad.any()) for grad in gradients)

    def forget_gradients(self) -> None:
        """Let gradients so far be of no use to the next step, for `has_gradients`; they stay where they are."""
        self._has_backward = False

    def frozen(self) -> Frozen:
        """Return the values of all frozen parameters, for `restore_frozen`."""
        return {i: x.clone() for i, x in enumerate(self._values) if not self._parameters[i].requires_grad}

    def restore_frozen(self, values: Frozen) -> None:
        """Set frozen parameters in `x` to the `values` that `frozen` has returned, except those thawed since."""
        for i, value in values.items():
            if not self._parameters[i].requires_grad:
                self._values[i].copy_(value)

    def frozen_parts(self) -> list[slice]:
        """Return the parts of `x` that belong to frozen parameters, in order."""
        parts, offset = [], 0
        for p in self._parameters:
            if not p.requires_grad:
                parts.append(slice(offset, offset + p.numel()))
            offset += p.numel()
        return parts

    def frozen_names(self) -> list[str]:
        """Return the names of the frozen parameters."""
        return [name for name, p in zip(self.spec.names, self._parameters, strict=True) if not p.requires_grad]

    def keep_anchor(self, method: str) -> None:
        """Let `check` refuse a model that was loaded: the state of `method` has another, and would go back to that."""
        self._anchored = method
        for module in self.model.modules():  # a part may be loaded alone
            module._register_load_state_dict_pre_hook(Hook(self._before_loading))  # type: ignore[no-untyped-call]

    def accept_loaded(self) -> None:
        """Let the model be that of the state, which has been restored with it."""
        self._loaded_over = None

    def check(self) -> None:
        """Check before a step that model and optimizer are the original ones, and repair what can be repaired.

        Raises:
            ConfigError: the model is averaged, or was loaded, or a reason of `refresh`.
            DivergenceError: a parameter is not finite; looks every `FINITE_EVERY` steps.

        """
        if self.is_averaged:
            raise ConfigError(
                "a step inside averaged(), where the model is the mean over the ranks for now, would be lost at its "
                "end: train after the block"
            )
        self.refresh()
        if self._loaded_over is not None:
            if not torch.equal(self.x, self._loaded_over):
                raise ConfigError(
                    f"the model was loaded (load_state_dict) since the last step, but {self._anchored} makes its next "
                    "models of one that it has kept, and would go back to that. Load pretrained weights before "
                    "mpicomp.distribute(); to return to an earlier model in training, use gossip.save(folder) and "
                    "gossip.resume(folder, step=...)"
                )
            self._loaded_over = None
        # In double precision no sum of finite values overflows. Of one that does, the name is looked for later.
        if self._steps and self._steps % FINITE_EVERY == 0 and not self.x.sum(dtype=torch.float64).isfinite():
            raise DivergenceError("the model has a value that is not finite")

    def refresh(self) -> None:
        """Take up what the caller has written into the parameters, and check that they are still the original ones.

        Raises:
            ConfigError: a parameter was converted, moved or added; names it.

        """
        if self._unhooked:
            self._hook_gradients()
        self._held.check()
        self._take_written()

    def untrained(self) -> list[Tensor]:
        """Return all tensors of the model that are not in `x`: buffers, and parameters not held by the optimizer."""
        return [*self._held.others, *self.model.buffers()]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore parameters and buffers after the block, also those whose memory is the caller's (``p.data = ...``).

        The caller may have swapped other values in, and keep the parameters' own memory to swap back.
        """
        x, loaded_over, pointers = self.x.clone(), self._loaded_over, self._pointers
        memory = [p.data for p in self._parameters]
        rounded = [memory[i].clone() for i in self._copies]
        buffers = [(m._buffers, name, b) for m in self.model.modules() for name, b in m._buffers.items()]
        held = [(place, name, b) for place, name, b in buffers if b is not None and b.is_floating_point()]
        values = [b.clone() for _, _, b in held]
        try:
            yield
        finally:
            self.x.copy_(x)
            for p, data in zip(self._parameters, memory, strict=True):
                if p.data_ptr() != data.data_ptr():
                    p.data = data
            for i, value in zip(self._copies, rounded, strict=True):
                memory[i].copy_(value)
            for (place, name, buffer), value in zip(held, values, strict=True):
                place[name] = buffer  # the block may have put another in its place, as `half()` does
                buffer.copy_(value)
            self._loaded_over, self._pointers = loaded_over, pointers

    def _take_written(self) -> None:
        """Copy to `x` what the model, the optimizer or the caller has written into parameters outside of it."""
        if self.is_elsewhere:
            self._return_memory()
        self._read_parameters()

    def _read_parameters(self) -> None:
        """Copy parameters of another type to `x`."""
        _copy([self._values[i] for i in self._copies], [self._parameters[i].data for i in self._copies])

    def _micro_batch(self) -> Tensor:
        """Compute the gradient of one call of the closure into `g`, and return its loss."""
        self.zero_grad()
        with torch.enable_grad():
            loss = self.closure()
            has_backward = any(p.grad is not None and p in self._with_gradient for p in self._parameters)
            has_gradients = has_backward or any(
                p.grad is not None and p.grad is not shown
                for p, shown in zip(self._parameters, self._shown, strict=True)
            )
            value = finish_backward(loss, has_backward, has_gradients)
        self._collect()
        self.has_loss = loss is not None
        return value

    def _collect(self) -> None:
        """Copy gradients that are not views of `g` into `g`: zero_grad() of torch.optim removes the views.

        The forward pass may have written into parameters, too.
        """
        self._take_written()
        given = [p.grad if p.requires_grad else None for p in self._parameters]
        self._renew_views()
        for p, grad, g, shown in zip(self._parameters, given, self._gradients, self._shown, strict=True):
            if grad is None:
                self._with_gradient.discard(p)
                g.zero_()
                continue
            if grad is not shown:
                self._with_gradient.add(p)
            if grad is not g:
                g.copy_(grad.to_dense() if grad.is_sparse else grad)
        self._show_gradients(slice(0, self.spec.numel))

    def _renew_views(self) -> None:
        """Replace gradients that are no longer views of `g`: ``p.grad.data = ...`` gives the view other memory."""
        for i, (g, place) in enumerate(zip(self._gradients, self._places, strict=True)):
            if g.data_ptr() != place:
                self._gradients[i] = self.spec.split(self.g)[i].view(self.spec.shapes[i])

    def _clip(self) -> None:
        if self.clip is not None:
            self.clip(self.g)

    def _hook_gradients(self) -> None:
        """Install hooks that call `_after_gradient` for each parameter; a frozen one gets its hook when thawed."""
        for p in self._unhooked:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._after_gradient)  # type: ignore[no-untyped-call]
        self._unhooked = [p for p in self._unhooked if not p.requires_grad]

    def _after_gradient(self, p: Tensor) -> None:
        self._with_gradient.add(p)
        self._has_backward = True
        self._between_layers()

    def _before_loading(self, *_: object) -> None:
        if self._loaded_over is None:
            self._loaded_over = torch.cat([p.detach().reshape(-1).to(self.x.dtype) for p in self._parameters])

    def _between_layers(self, *_: object) -> None:
        if torch.compiler.is_compiling():  # a compiled model has no place between its layers
            return
        if self._meanwhile is not None and threading.get_ident() == self._thread and self._meanwhile():
            self._meanwhile = None

    def _show_gradients(self, part: slice, skips_absent: bool = False) -> None:
        """Set the gradients of parameters in `part` to their views of `g`, rounded for parameters of another type.

        Other parameters, and frozen ones, get no gradient, so the optimizer does not change them. With `skips_absent`,
        neither do those that had none in this step, unless the algorithm or the caller has written one.
        """
        offset = 0
        rounded: list[Tensor] = []
        exact: list[Tensor] = []
        for i, (p, g) in enumerate(zip(self._parameters, self._gradients, strict=True)):
            is_shown = offset < part.stop and part.start < offset + g.numel() and p.requires_grad
            if is_shown and skips_absent and p not in self._with_gradient:
                is_shown = bool(g.any())
            p.grad = (g if p.dtype == g.dtype else torch.empty_like(p)) if is_shown else None
            self._shown[i] = p.grad
            offset += g.numel()
            if p.grad is not None and p.grad is not g:
                rounded.append(p.grad)
                exact.append(g)
        _copy(rounded, exact)

    def _return_memory(self) -> None:
        """Copy parameters that were given other memory (``p.data = ...``) back into `x`."""
        for name, p, x, dtype in zip(self.spec.names, self._parameters, self._values, self.dtypes, strict=True):
            if (p.dtype, p.shape, p.device) != (dtype, x.shape, x.device):
                raise ConfigError(
                    f"parameter {name!r} is {p.dtype} {tuple(p.shape)} on {p.device} now, and was {dtype} "
                    f"{tuple(x.shape)} on {x.device} when the model was distributed: convert and move a model before "
                    "mpicomp.distribute()"
                )
            if p.data_ptr() != x.data_ptr():
                x.copy_(p.detach())
                if dtype == x.dtype:
                    p.data = x
        self._pointers = [p.data_ptr() for p in self._parameters]


def _copy(into: list[Tensor], tensors: list[Tensor]) -> None:
    """Copy `tensors`, one to each tensor of another type in `into`; on a GPU all at once."""
    if into:
        torch._foreach_copy_(into, tensors)


def _no_closure() -> Tensor:
    raise AssertionError("set FlatModel.closure before the first gradient")
