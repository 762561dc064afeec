"""Checks that compare ranks: the same settings and tensors for all methods, the same model for sums of gradients.

If settings or tensors differed between ranks, their messages would not fit. Methods that add up gradients do not send
the model, so a rank with another learning rate, another frozen layer or another state of its optimizer would drift away
from the others without an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpicomp.compression.wrap.by_rank import STRENGTHS
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World
from mpicomp.exchange.guard import agree
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.model_checks import listed, plain_name
from mpicomp.state import ADDRESS
from mpicomp.topology.base import Schedule, Topology

EVERY_STEPS = 50
"""Steps from one comparison to the next."""

TOLERANCE = 1e-5
"""The allowed difference of sums over all parameters, relative to the sum of absolute values; all-reduces round."""


HOW_COMPUTED = ("foreach", "fused", "capturable", "differentiable")
"""Hyper-parameters of optimizers of torch that say how a step is computed, not what it does."""


SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
"""The types of tensors in the state of optimizers that are compared."""


class Sums(NamedTuple):
    """The sum of the entries of some tensors, and that of their absolute values."""

    total: float
    absolute: float


class Compared(NamedTuple):
    """The values that ranks compare.

    Attributes:
        rates: the learning rate of each group.
        frozen: the names of frozen parameters.
        model: the sums over all parameters.
        hyper: the other hyper-parameters of each group, by ``"weight_decay of group 0"``.
        state: the sums over what the optimizer keeps, by its name there, such as ``"momentum_buffer"``.

    """

    rates: tuple[float, ...]
    frozen: tuple[str, ...]
    model: Sums
    hyper: dict[str, str]
    state: dict[str, Sums]


def compared(local: FlatModel) -> Compared:
    """Return the values of this rank to compare with those of other ranks."""
    optimizer = local.optimizer
    chosen = [key for key in optimizer.defaults if key not in ("lr", *HOW_COMPUTED)]
    return Compared(
        tuple(float(group["lr"]) for group in optimizer.param_groups),
        tuple(local.frozen_names()),
        _sums([local.x.detach()]),
        {
            f"{key} of group {i}": _shown(group[key])
            for i, group in enumerate(optimizer.param_groups)
            for key in chosen
            if key in group
        },
        _sums_of_state(optimizer),
    )


def _sums_of_state(optimizer: torch.optim.Optimizer) -> dict[str, Sums]:
    kept: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, int | float):
                    kept.setdefault(key, []).append(torch.tensor(value))
                elif type(value) is Tensor and value.layout == torch.strided and value.dtype in SUMMED:
                    kept.setdefault(key, []).append(value.detach())
    return {key: _sums(tensors) for key, tensors in kept.items()}


def _sums(tensors: list[Tensor]) -> Sums:
    # Sums of tensors on a GPU are waited for once, not tensor by tensor.
    total = sum(t.sum(dtype=torch.float64) for t in tensors)
    return Sums(float(total), float(sum(t.abs().sum(dtype=torch.float64) for t in tensors)))


def require_same_settings(world: World, settings: Mapping[str, object]) -> None:
    """Compare `settings` with those of rank 0; collective on all ranks.

    What ranks may have of their own (the ratios of `ByRank`, the weights of ``volumes``) is a setting that lists the
    values of all ranks, so it is the same on all of them. Fields of a dataclass are compared unless they have
    ``compare=False``.

    Raises:
        ConfigError: on all ranks; names the first setting that differs, its values, and the ranks.

    """
    own = {path: value for name, setting in settings.items() for path, value in _settings(name, setting)}
    first = world.broadcast(own)
    differs = next((path for path in [*first, *own] if first.get(path) != own.get(path)), None)
    found = world.all_gather(None if differs is None else (differs, own.get(differs, "missing")))
    other = next(filter(None, found), None)
    if other is None:
        return
    path, value = other
    ranks = [str(rank) for rank, each in enumerate(found) if each == other]
    remedy = "all ranks need the same settings"
    if path.endswith(".seed"):
        remedy += ", seeds too: where ranks are to draw different numbers, methods see to it by themselves"
    if path.endswith(STRENGTHS):
        remedy += ". mpicomp.compression.allocate makes one compressor for all, with a ratio for each rank"
    error = ConfigError(
        f"{path} differs between ranks: {first.get(path, 'missing')} on rank 0, and {value} on "
        f"rank{'s' * (len(ranks) > 1)} {listed(ranks)}; {remedy}"
    )
    agree(world, error)


def _settings(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield paths and texts of a setting and of those in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield path, type(value).__name__
        for field in dataclasses.fields(value):
            if field.compare:
                yield from _settings(f"{path}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Topology):
        yield path, value.name
        yield f"{path}.weights", value.weights_digest[:12]
    elif isinstance(value, Schedule):
        yield path, value.name
        yield from _settings(f"{path}.union", value.union)
    elif isinstance(value, list | tuple) and any(map(dataclasses.is_dataclass, value)):
        for i, each in enumerate(value):
            yield from _settings(f"{path}[{i}]", each)
    elif isinstance(value, set | frozenset):
        yield path, str(sorted(map(repr, value)))  # the order of texts in a set differs between processes
    else:
        yield path, _shown(value)


def require_same_tensors(world: World, local: FlatModel) -> None:
    """Compare names, shapes and types of the model's tensors with those of rank 0; collective on all ranks.

    Raises:
        ConfigError: on all ranks; names the rank and the first tensor that differs.

    """
    tensors = [*local.model.named_parameters(), *local.model.named_buffers()]
    own = {plain_name(name): f"{t.dtype} {tuple(t.shape)}" for name, t in tensors}
    remedy = "Build the same model on all ranks"
    _agree_on_first(world, _other_tensor(world.broadcast(own), own, world.rank, remedy))


def require_same_buffers(world: World, buffers: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and types of buffers with those of rank 0; collective on all ranks.

    Raises:
        ConfigError: on all ranks; names the rank and the first buffer that differs.

    """
    own = {name: f"{b.dtype} {tuple(b.shape)}" for name, b in buffers.items()}
    remedy = (
        "Buffers of the state_dict are averaged, so all ranks need the same. Register one that grows or differs with "
        "persistent=False"
    )
    _agree_on_first(world, _other_tensor(world.broadcast(own), own, world.rank, remedy))


def _other_tensor(first: dict[str, str], other: dict[str, str], rank: int, remedy: str) -> ConfigError | None:
    for name in [*first, *other]:
        if first.get(name) != other.get(name):
            return ConfigError(
                f"rank {rank} has another model than rank 0: {name} is {other.get(name, 'missing')}, and "
                f"{first.get(name, 'missing')} on rank 0. {remedy}"
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
            f"rank {rank} has the learning rates {_rates(other.rates)}, rank {reference} {_rates(first.rates)}: both "
            "need the same. Let all ranks step their schedulers alike; give ReduceLROnPlateau a loss that is averaged "
            "over ranks"
        )
    if other.frozen != first.frozen:
        names = sorted(set(other.frozen) ^ set(first.frozen))[:4]
        return ConfigError(
            f"rank {rank} and rank {reference} have frozen different parameters ({', '.join(names)}): "
            "freeze the same on all ranks"
        )
    for name in [*first.hyper, *other.hyper]:
        if first.hyper.get(name) != other.hyper.get(name):
            return ConfigError(
                f"the optimizer of rank {rank} has {name} = {other.hyper.get(name, 'missing')}, that of rank "
                f"{reference} {first.hyper.get(name, 'missing')}: both need the same"
            )
    if _are_apart(first.model, other.model):
        return ConfigError(
            f"rank {rank} holds another model than rank {reference} (sums of the parameters: {other.model.total:.9g} "
            f"and {first.model.total:.9g}), but both must be equal: something has changed parameters on one rank "
            "alone, such as loading or initializing them after mpicomp.distribute()"
        )
    for name in [*first.state, *other.state]:
        theirs, own = first.state.get(name, Sums(0.0, 0.0)), other.state.get(name, Sums(0.0, 0.0))
        if _are_apart(theirs, own):
            return ConfigError(
                f"the optimizer of rank {rank} has another state than that of rank {reference} (sums of the absolute "
                f"values of {name!r}: {own.absolute:.9g} and {theirs.absolute:.9g}), but both must be equal: load the "
                "state of an optimizer on all ranks, or on none"
            )
    return None


def _are_apart(first: Sums, other: Sums) -> bool:
    """Return whether sums differ by more than rounding; what is not a number is reported elsewhere."""
    apart = max(abs(other.total - first.total), abs(other.absolute - first.absolute))
    return not (apart <= TOLERANCE * first.absolute or math.isnan(apart))


def _agree_on_first(world: World, error: ConfigError | None) -> None:
    """Raise on all ranks the error of the first rank that has one: all others may differ from rank 0 alike."""
    first = next(filter(None, world.all_gather(error)), None)
    if first is not None:
        agree(world, first)


def _rates(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _shown(value: Any) -> str:
    """Return the text of a setting, the same in all processes and on all devices; ``betas`` may be tensors."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    return ADDRESS.sub("", repr(value.tolist() if isinstance(value, Tensor) else value))
