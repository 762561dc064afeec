"""Checks that compare ranks: the same tensors for all methods, the same model for methods that add up gradients.

If tensors differed between ranks, their messages would not fit. Methods that add up gradients do not send the model, so
a rank with another learning rate or another frozen layer would drift away from the others without an error.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import agree
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.model_checks import plain_name

EVERY_STEPS = 50
"""Steps from one comparison to the next."""

TOLERANCE = 1e-5
"""The allowed difference of sums over all parameters, relative to the sum of absolute values; all-reduces round."""


class Compared(NamedTuple):
    """The values that ranks compare: learning rates by group, names of frozen parameters, sums over all parameters."""

    rates: tuple[float, ...]
    frozen: tuple[str, ...]
    total: float
    absolute: float


def compared(local: FlatModel) -> Compared:
    """Return the values of this rank to compare with those of other ranks."""
    x = local.x.detach()
    return Compared(
        tuple(float(group["lr"]) for group in local.optimizer.param_groups),
        tuple(local.frozen_names()),
        float(x.sum(dtype=torch.float64)),
        float(x.abs().sum(dtype=torch.float64)),
    )


def require_same_tensors(world: World, local: FlatModel) -> None:
    """Compare names, shapes and types of the model's tensors with those of rank 0; collective on all ranks.

    Raises:
        ConfigError: on all ranks; names the rank and the first tensor that differs.

    """
    tensors = [*local.model.named_parameters(), *local.model.named_buffers()]
    own = {plain_name(name): f"{t.dtype} {tuple(t.shape)}" for name, t in tensors}
    _agree_on_first(world, _other_tensor(world.broadcast(own), own, world.rank))


def _other_tensor(first: dict[str, str], other: dict[str, str], rank: int) -> ConfigError | None:
    for name in [*first, *other]:
        if first.get(name) != other.get(name):
            return ConfigError(
                f"rank {rank} has another model than rank 0: {name} is {other.get(name, 'missing')}, and "
                f"{first.get(name, 'missing')} on rank 0. Build the same model on all ranks"
            )
    return None


def require_same_model(world: World, local: FlatModel, groups: Groups | None = None) -> None:
    """Compare all ranks with rank 0, or with the first rank of their node; collective on all ranks.

    Args:
        world: the ranks.
        local: the model of this rank.
        groups: the ranks of each node, if only these must hold the same model.

    Raises:
        ConfigError: on all ranks; names the rank that differs, and the difference.

    """
    own = compared(local)
    if groups is None:
        _agree_on_first(world, _difference(world.broadcast(own), own, world.rank))
    else:
        first = next(group[0] for group in groups if world.rank in group)
        _agree_on_first(world, _difference(world.all_gather(own)[first], own, world.rank, first))


def _difference(first: Compared, other: Compared, rank: int, reference: int = 0) -> ConfigError | None:
    if other.rates != first.rates:
        return ConfigError(
            f"rank {rank} has the learning rates {_shown(other.rates)}, rank {reference} {_shown(first.rates)}: both "
            "need the same. Let all ranks step their schedulers alike; give ReduceLROnPlateau a loss that is averaged "
            "over ranks"
        )
    if other.frozen != first.frozen:
        names = sorted(set(other.frozen) ^ set(first.frozen))[:4]
        return ConfigError(
            f"rank {rank} and rank {reference} have frozen different parameters ({', '.join(names)}): "
            "freeze the same on all ranks"
        )
    apart = abs(other.total - first.total)
    if not (apart <= TOLERANCE * first.absolute or math.isnan(apart)):  # what is not a number is reported elsewhere
        return ConfigError(
            f"rank {rank} holds another model than rank {reference} (sums of the parameters: {other.total:.9g} and "
            f"{first.total:.9g}), but both must be equal: something has changed parameters on one rank "
            "alone, such as loading or initializing them after mpicomp.distribute()"
        )
    return None


def _agree_on_first(world: World, error: ConfigError | None) -> None:
    """Raise on all ranks the error of the first rank that has one: all others may differ from rank 0 alike."""
    first = next(filter(None, world.all_gather(error)), None)
    if first is not None:
        agree(world, first)


def _shown(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)
