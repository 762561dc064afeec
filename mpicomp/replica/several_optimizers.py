"""Several optimizers of one model, seen as one: Muon for its matrices and AdamW for the rest, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mpicomp.errors import ConfigError


class SeveralOptimizers(torch.optim.Optimizer):
    """Optimizers that make their steps one after another, as one optimizer with the groups of all of them.

    Groups, and what is kept for each parameter, stay those of the single optimizers, so a scheduler may hold one of
    these.

    Args:
        optimizers: at least one; each has parameters of its own.

    Attributes:
        optimizers: these.

    Raises:
        ConfigError: there is none, one is of another kind, or two hold the same parameter.

    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
        if odd := [type(each).__name__ for each in given if not isinstance(each, torch.optim.Optimizer)]:
            raise ConfigError(f"the optimizer is {', '.join(odd)}: give a torch.optim.Optimizer, or a list of them")
        if not given:
            raise ConfigError("the list of optimizers is empty")
        # Not Optimizer.__init__, which would make groups and a state of its own; this makes the hooks.
        self.optimizers = given
        self.__setstate__({})
        owners: dict[Tensor, torch.optim.Optimizer] = {}
        for optimizer in self.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if owners.setdefault(p, optimizer) is not optimizer:
                    raise ConfigError(
                        f"{type(owners[p]).__name__} and {type(optimizer).__name__} hold the same parameter of shape "
                        f"{tuple(p.shape)}, which would make two steps: give it to one of them"
                    )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers, in the order of these."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """What the optimizers keep for each parameter."""
        return {p: kept for optimizer in self.optimizers for p, kept in optimizer.state.items()}

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default hyper-parameters of all optimizers; for the same name, those of the first that has it."""
        return {key: value for optimizer in reversed(self.optimizers) for key, value in optimizer.defaults.items()}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let each optimizer make its step; with `closure`, after the gradient has been computed once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients of all parameters to None, or to zero."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state, from `state_dict` of as many groups, into the single optimizers."""
        groups, begin = state_dict["param_groups"], 0
        for optimizer in self.optimizers:
            part = groups[begin : begin + len(optimizer.param_groups)]
            own = {number for group in part for number in group["params"]}
            state = {number: kept for number, kept in state_dict["state"].items() if number in own}
            optimizer.load_state_dict({"state": state, "param_groups": part})
            begin += len(part)
        if begin != len(groups):
            raise ValueError(f"the stored state has {len(groups)} parameter groups, these optimizers have {begin}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ConfigError: a group belongs to one of the optimizers.

        Raises:
            ConfigError: always.

        """
        raise ConfigError("add the parameter group to one of the optimizers, before mpicomp.distribute()")


def singles(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of which `optimizer` consists."""
    return optimizer.optimizers if isinstance(optimizer, SeveralOptimizers) else [optimizer]
