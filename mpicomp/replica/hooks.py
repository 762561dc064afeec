"""Hooks on the modules of a model that is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """A hook on a module that is trained. Copies of the module, and stored modules, get a hook that does nothing.

    Otherwise copying a module would copy the whole training state with it.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: object) -> None:
        """Call the function of the hook."""
        self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (_nothing,)


def hook_layers(model: nn.Module, function: Callable[..., None]) -> None:
    """Call `function` after each layer of a forward pass of `model`: after each module that has no modules inside."""
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(Hook(function))


def _nothing(*_: object) -> None:
    pass
