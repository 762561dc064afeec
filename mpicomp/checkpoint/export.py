"""The averaged model of a checkpoint as a `state_dict`, for programs that know nothing of ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import mean_in_order

SUFFIXES = (".safetensors", ".pt", ".pth")


def mean_model(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the `state_dict` of the mean model over ranks: tensors by name; tied weights share one tensor.

    Parameters and floating-point buffers are averaged as in training, so that the result is the run's ``model.h5``, bit
    for bit; parameters have the model's types; counters and parameters that were not trained are rank 0's.

    Raises:
        CheckpointError: a file is damaged or missing.

    """
    checkpoint.check(range(checkpoint.manifest.size))
    first = checkpoint.read_checked(0)
    names = [name for name, leaf in first.items() if name.startswith("model/") and isinstance(leaf, Tensor)]
    means = {name: _mean(checkpoint, name, cast(Tensor, first[name])) for name in names}
    parameters = dict(_split(means.pop("model/parameters"), str(first["model/tensors"])))
    model = {**parameters, **{name.split("/", 2)[2]: tensor for name, tensor in means.items()}}
    aliases: dict[str, str] = json.loads(str(first["model/aliases"]))
    return {**model, **{name: model[other] for name, other in aliases.items()}}


def save(model: dict[str, Tensor], path: Path) -> None:
    """Write a `state_dict`: ``.safetensors``, or ``.pt`` for `torch.load`.

    A tensor with several names is stored once. A ``.pt`` file has all names, so ``load_state_dict(strict=True)``
    accepts it. The format ``.safetensors`` has no sharing: the tensor has its first name, and the metadata map each
    other name to the first. `safetensors.torch.save_model` does the same, and `safetensors.torch.load_model` and
    `transformers` expect it.

    Raises:
        ConfigError: the suffix is another, safetensors is not installed, or the path cannot be written.

    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}, which say in what form to write")
    try:
        if path.suffix == ".safetensors":
            _save_safetensors(model, path)
        else:
            torch.save(model, path)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error


def _save_safetensors(model: dict[str, Tensor], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ConfigError("safetensors is not installed: pip install safetensors") from error
    first: dict[Tensor, str] = {}
    names = {name: first.setdefault(tensor, name) for name, tensor in model.items()}
    metadata = {name: other for name, other in names.items() if name != other}
    # Version 4 of transformers refuses a file that does not name the library of its tensors.
    save_file({name: tensor.contiguous() for tensor, name in first.items()}, path, {**metadata, "format": "pt"})


def _mean(checkpoint: Checkpoint, name: str, first: Tensor) -> Tensor:
    if not first.is_floating_point() or name.startswith("model/frozen/"):
        return first
    others = [cast(Tensor, checkpoint.read_checked(rank, [name])[name]) for rank in range(1, checkpoint.manifest.size)]
    return mean_in_order([first, *others])


def _split(flat: Tensor, tensors: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor for each part of the flat vector (n,)."""
    start = 0
    for name, shape, dtype in json.loads(tensors):
        stop = start + math.prod(shape)
        part = flat[start:stop].view(shape)
        yield name, part.to(getattr(torch, dtype), copy=True)
        start = stop
    assert start == flat.numel()
