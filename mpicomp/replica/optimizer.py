"""A `torch.optim.Optimizer` whose step is a distributed step of all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, overload

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpicomp.errors import ConfigError
from mpicomp.replica.flat import FlatModel, flat_model_of

given: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""The optimizers of distributed models."""


class Steps(Protocol):
    """The part of `Distributed` that the optimizer uses.

    Attributes:
        local: the flat model.
        steps: the number of steps done.

    """

    local: FlatModel
    steps: int

    def step(self, closure: Callable[[], Tensor | None]) -> Tensor:
        """Do one step with the gradient of `closure`."""

    def step_with_gradients(self, is_skipped: bool = False, scale: Tensor | None = None) -> None:
        """Do one step with the gradients in ``p.grad``."""


class DistributedOptimizer(torch.optim.Optimizer):
    """Replaces the optimizer in a training loop; shares its groups, state and defaults.

    Schedulers, `torch.amp.GradScaler` and Trainers accept it like other optimizers. Its step hooks run around the whole
    step, and see the gradients of this rank. Hooks of the original optimizer run around the local step.
    """

    _step_supports_amp_scaling = True
    """Makes `GradScaler.step` call `step` also after an overflow, because other ranks wait for this rank's exchange."""

    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, gossip: Steps) -> None:
        # Not Optimizer.__init__, which would make groups and a state of its own; this makes the hooks.
        self._gossip = gossip
        self._own = gossip.local.optimizer
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Raise ConfigError: a copy would exchange messages that no other rank expects.

        Raises:
            ConfigError: always.

        """
        raise ConfigError(
            "gossip.optimizer cannot be copied or pickled, because its steps belong to all ranks: keep "
            "gossip.optimizer.state_dict(), or a copy of your own optimizer from before mpicomp.distribute()"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the original optimizer."""
        return self._own.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the original optimizer."""
        return self._own.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default hyper-parameters of the original optimizer."""
        return self._own.defaults

    @property
    def _opt_called(self) -> bool:
        """Whether a step was made, by closure or optimizer; schedulers warn if they are called before the first."""
        return self._gossip.steps > 0

    @_opt_called.setter
    def _opt_called(self, _: bool) -> None:
        """Ignore the value that schedulers set when they wrap `step`."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of training with the gradients in ``p.grad``, or with `closure`; collective on all ranks.

        With a closure, this is `Distributed.step`. After an overflow in float16 (`GradScaler`), this rank only takes
        part in the exchange; see `Distributed.step_with_gradients`.
        """
        if closure is not None:
            return self._gossip.step(closure)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        is_skipped = found_inf is not None and bool(found_inf)  # waits for the device, as torch's own optimizers do
        self._gossip.step_with_gradients(is_skipped, getattr(self, "grad_scale", None))
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to zero in place; `set_to_none` is ignored, because they are views of one vector."""
        self._gossip.local.zero_grad()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state into the original optimizer."""
        self._own.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ConfigError: the parameters of a distributed model are fixed.

        Raises:
            ConfigError: always.

        """
        raise ConfigError(
            "a parameter group cannot be added after mpicomp.distribute(): give all parameters to the optimizer first; "
            "those to be trained later may be frozen by requires_grad_(False)"
        )


def _refuse_lone_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Refuse a step on parameters of a distributed model that is not part of a distributed step.

    The optimizer may be the one that was distributed, or another one of torch over the same parameters. Those of other
    packages may wrap ``gossip.optimizer``, whose step they call in theirs.
    """
    if optimizer not in given and not type(optimizer).__module__.startswith("torch.optim"):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            local = flat_model_of(parameter)
            if local is None:
                continue
            if local.is_updating or local.is_averaged:
                return
            raise ConfigError(
                "optimizer.step() would train this rank alone: call gossip.optimizer.step(), or gossip.step(closure), "
                "where gossip = mpicomp.distribute(...). For another training, with an optimizer of its own, use "
                "copy.deepcopy(model)"
            )


register_optimizer_step_pre_hook(_refuse_lone_step)
