"""Checks whether a model and its optimizer can be distributed; error messages name the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from mpicomp.errors import ConfigError
from mpicomp.replica.several_optimizers import singles

LISTED = 4
"""How many tensors an error names at most."""


def listed(names: Sequence[str]) -> str:
    """Return a text with the first of `names`, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def plain_name(name: str) -> str:
    """Return the name of a tensor without the prefixes of `torch.compile`."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters with their names without the prefixes of `torch.compile`."""
    return [(plain_name(name), p) for name, p in model.named_parameters()]


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of `model` that `optimizer` holds, by name, in the model's order.

    Frozen parameters are included, because they may be thawed.

    Raises:
        ConfigError: the optimizer does not hold exactly the trainable parameters of the model, or its step cannot be
            made here; the model is distributed already, is incomplete, or has parameters on several devices or of a
            type that has no mean.

    """
    _check_kinds(model, optimizer)
    named = named_parameters(model)
    if lazy := [name for name, p in named if isinstance(p, nn.parameter.UninitializedParameter)]:
        raise ConfigError(f"parameters have no shape yet: {listed(lazy)}. Pass one batch through the model first")
    held = {p: (i, j) for i, group in enumerate(optimizer.param_groups) for j, p in enumerate(group["params"])}
    own = {p for _, p in named}
    if foreign := [f"number {j} of group {i}, shape {tuple(p.shape)}" for p, (i, j) in held.items() if p not in own]:
        raise ConfigError(
            f"the optimizer has parameters that are not the model's: {listed(foreign)}. Make the optimizer of "
            "model.parameters() of the model that is distributed, after anything that replaces them"
        )
    if missing := [name for name, p in named if p.requires_grad and p not in held]:
        raise ConfigError(
            f"the model has trainable parameters that the optimizer does not hold: {listed(missing)}. Give them to "
            "the optimizer or to a second one, distribute(model, [optimizer, second], ...), or freeze them by "
            "requires_grad_(False)"
        )
    trained = [(name, p) for name, p in named if p in held]
    if not any(p.requires_grad for _, p in trained):
        raise ConfigError("the model has no trainable parameters")
    if empty := [name for name, p in named if p.is_meta]:
        raise ConfigError(
            f"parameters are on the meta device and have no values: {listed(empty)}. Materialize them first"
        )
    devices = {p.device: name for name, p in trained}
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ConfigError(f"the model's parameters must be on one device, not: {places}")
    if odd := [f"{name} ({p.dtype})" for name, p in trained if not p.dtype.is_floating_point]:
        raise ConfigError(f"trained parameters must be real floating-point numbers, not: {listed(odd)}")
    if sparse := [f"{name} ({b.layout})" for name, b in model.named_buffers() if b.layout != torch.strided]:
        raise ConfigError(
            f"buffers must be dense, not: {listed(sparse)}. Keep a sparse matrix as a plain attribute of the module"
        )
    if pair := _overlapping(trained):
        raise ConfigError(
            f"{pair[0]} and {pair[1]} are two parameters in the same memory, which would part: tie weights by making "
            "them one parameter (decoder.weight = encoder.weight) before the optimizer is made"
        )
    return trained


def _overlapping(named: list[tuple[str, nn.Parameter]]) -> tuple[str, str] | None:
    """Return the names of two parameters that share memory, in the model's order, if there are any."""
    order = {name: i for i, (name, _) in enumerate(named)}
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in named if p.numel())
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            first, second = sorted((name, other), key=order.__getitem__)
            return first, second
    return None


def _check_kinds(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or "FullyShardedDataParallel" in {type(m).__name__ for m in model.modules()}:
        raise ConfigError(
            f"the model is wrapped in {type(model).__name__}, which exchanges gradients itself: pass the module in it"
        )
    if not torch.distributed.is_initialized() and (
        synchronized := [plain_name(name) for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    ):
        raise ConfigError(
            f"SyncBatchNorm would not synchronize without torch.distributed: {listed(synchronized)}. Use BatchNorm, "
            "whose statistics averaged() averages"
        )
    kinds = {type(each) for each in singles(optimizer)}
    if any(issubclass(kind, torch.optim.LBFGS) for kind in kinds):
        raise ConfigError(
            "LBFGS computes several gradients a step, which is not supported: use a first-order optimizer, such as SGD "
            "or Adam"
        )
    if any(issubclass(kind, torch.optim.SparseAdam) for kind in kinds):
        raise ConfigError(
            "SparseAdam takes sparse gradients only, and exchanged ones are dense: use Adam, and nn.Embedding with "
            "sparse=False"
        )
