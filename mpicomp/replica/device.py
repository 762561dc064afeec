"""The device of a model in a script of your own."""

from __future__ import annotations

import torch
from torch import nn

from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.placement import DeviceKind


def device_of(model: nn.Module) -> DeviceKind:
    """Return the kind of device that `model` is on, where messages are decoded, too."""
    return "cuda" if any(p.is_cuda for p in model.parameters()) else "cpu"


def place(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, is_moved: bool) -> None:
    """Move `model` to the device of this rank if `is_moved`, or check that it is there; collective on all ranks.

    Raises:
        ConfigError: the model is elsewhere, or cannot be moved because its optimizer has made steps.

    """
    with together(world):
        elsewhere = {p.device for p in model.parameters()} - {world.device}
        if not elsewhere:
            return
        if any(p.is_meta for p in model.parameters()):
            raise ConfigError(
                "the model is on the meta device and has no values: call model.to_empty(device=...), give it values, "
                "and make its optimizer then"
            )
        if not is_moved:
            raise ConfigError(
                f"the model is on {', '.join(sorted(map(str, elsewhere)))}, but this rank trains on {world.device}: "
                "give mpicomp.distribute() device = 'cuda' (or 'cpu'), which moves the model, or move it to "
                "gossip's device before its optimizer is made"
            )
        if optimizer.state:
            raise ConfigError(
                f"the optimizer has state on another device than {world.device}: move the model there before the "
                "optimizer is made, or distribute before its first step"
            )
        model.to(world.device)
