"""Which parameters a model and its optimizer hold; changes in training are noticed, and refused where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mpicomp.errors import ConfigError
from mpicomp.replica.model_checks import listed, named_parameters


class HeldParameters:
    """The parameters of a model that its optimizer holds, and the groups to which they belong.

    Args:
        model: whose parameters they are.
        optimizer: holds them in groups.
        named: these parameters with their names, in the order of the flat vector.

    Attributes:
        parts: the parts of the flat vector, in order, each with the number of its group.
        others: the model's parameters that the optimizer does not hold.

    Raises:
        ConfigError: as `check`.

    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]]
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._own = set(self._parameters)
        self._read_groups()
        self._read_modules()

    def check(self) -> None:
        """Look for changes since the last time.

        Raises:
            ConfigError: a parameter that is trained was added, replaced or removed; names it.

        """
        if [len(group["params"]) for group in self._optimizer.param_groups] != self._sizes:
            self._read_groups()
        if any(len(now) != len(then) or not all(map(is_, now.values(), then)) for now, then in self._children):
            self._check_modules()
            self._read_modules()
        if any(p.requires_grad for p in self.others):
            self._check_modules()

    def _read_groups(self) -> None:
        """Determine which group holds which part of the flat vector."""
        groups = self._optimizer.param_groups
        self._sizes = [len(group["params"]) for group in groups]
        index = {p: i for i, group in enumerate(groups) for p in group["params"]}
        if added := [tuple(p.shape) for p in index if p not in self._own]:
            raise ConfigError(
                f"the optimizer has got parameters of shapes {added} since mpicomp.distribute(), which would not be "
                "trained together: make model and optimizer complete first (a layer to be added later may be there "
                "from the beginning, frozen by requires_grad_(False))"
            )
        if removed := [name for name, p in zip(self._names, self._parameters, strict=True) if p not in index]:
            raise ConfigError(
                f"the optimizer has lost parameters since mpicomp.distribute(): {listed(removed)}. "
                "Freeze them by requires_grad_(False) instead"
            )
        self.parts: list[tuple[slice, int]] = []
        offset = 0
        for p in self._parameters:
            stop, group = offset + p.numel(), index[p]
            if self.parts and self.parts[-1][1] == group:
                self.parts[-1] = slice(self.parts[-1][0].start, stop), group
            else:
                self.parts.append((slice(offset, stop), group))
            offset = stop

    def _read_modules(self) -> None:
        """Remember the parameters of each module, to notice changes."""
        held: list[dict[str, Any]] = []
        for module in self._model.modules():
            held += module._modules, module._parameters
        self._children = [(children, list(children.values())) for children in held]
        self.others: list[Tensor] = [p for p in self._model.parameters() if p not in self._own]

    def _check_modules(self) -> None:
        """Raise ConfigError if the model's trainable parameters have changed."""
        found = dict(named_parameters(self._model))
        if added := [name for name, p in found.items() if p.requires_grad and p not in self._own]:
            raise ConfigError(
                f"the model has got trainable parameters since mpicomp.distribute(): {listed(added)}. They would not "
                "be trained together: build the whole model first, and give the optimizer what is to be thawed later"
            )
        now = set(found.values())
        if lost := [name for name, p in zip(self._names, self._parameters, strict=True) if p not in now]:
            raise ConfigError(
                f"the model has lost parameters since mpicomp.distribute(): {listed(lost)}. Freeze them by "
                "requires_grad_(False) instead of removing or replacing them"
            )
