"""States for checkpoints: conversion to ``{path: tensor or number}`` and back, and the field metadata that control it.

A state is a tree of dataclasses, lists, tensors, numbers, strings and None. Paths such as ``"compressor/residual"``
name its leaves. To restore, make a state with `init`; the stored leaves then replace its leaves one by one. A leaf that
does not fit is an error that names the path.
"""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpicomp.errors import CheckpointError

State = Any
"""A dataclass of tensors and numbers that changes from step to step, or None for a compressor without memory.

The metadata of a field control what a checkpoint does with it. A field without metadata is stored, and a run that
continues with another number of ranks takes the mean over the old ranks (of numbers and counters, rank 0's). That suits
error memories, too: methods average the messages of ranks, so the mean is what the errors will add to the model.

A field that ``waits`` has one entry for each of the model, and those of frozen parameters have no part in a step
(`waiting`).
"""

SCRATCH = {"scratch": True}
"""A field without meaning between steps; it is not stored."""

PUBLIC_COPY = {"resize": "model"}
"""A field made of copies of models: on new ranks it is the mean model, as after a dense exchange of it."""

ERROR_OF_GRADIENTS = {"waits": True}
"""An error memory (n,) of what makes steps of the model, as gradients do: that of frozen parameters waits."""

MOMENT = {"waits": True}
"""A moment (n,) of gradients: that of frozen parameters stays as it is, as in `torch.optim`."""

SERVERS = {"resize": "servers", "waits": True}
"""An error memory (n,) that is equal on all servers, and (0,) on other ranks: new servers get a copy."""

IN_FLIGHT = {"resize": "refused"}
"""A field of messages that are pending between steps: it cannot be restored on another number of ranks."""

OWN = {"resize": "own"}
"""A field that is particular to a rank: new ranks keep the value from `init`."""

COUNTS = {"resize": "counts"}
"""What a rank counts in the consensus model (SGP's weight): new ranks keep the value from `init`."""

ADDRESS = re.compile(" at 0x[0-9a-f]+")
"""In the text of a function, or of an object that has none of its own: it differs between processes."""

Leaf = Tensor | int | float | str | bool

TORCH_GENERATOR = threading.Lock()
"""Hold it around any use of the state of torch's default generator by ranks that are threads of one process.

``torch.get_rng_state`` holds the generator's own mutex while it makes a tensor. If Python collects garbage just then,
another thread may run, and if it wants the same mutex, it waits with Python's interpreter lock in its hands: a
deadlock.
"""


def flatten(state: Any) -> dict[str, Leaf]:
    """Return the leaves of `state` by path; tensors are not copied.

    Raises:
        CheckpointError: a value cannot be stored. This shows when the state is first flattened, not on restart.

    """
    return {path: getattr(holder, key) if isinstance(key, str) else holder[key] for path, holder, key in _leaves(state)}


def resize_rules(state: Any) -> dict[str, str]:
    """Return by path the rules in the metadata of fields: how a leaf changes with the number of ranks."""
    rules = {}
    for path, holder, key in _leaves(state):
        if dataclasses.is_dataclass(holder):
            metadata = {field.name: field.metadata for field in dataclasses.fields(holder)}[str(key)]
            if "resize" in metadata:
                rules[path] = str(metadata["resize"])
    return rules


def waiting(state: Any) -> list[Tensor]:
    """Return the vectors (n,) of `state` whose entries of frozen parameters wait until these are thawed."""
    found = []
    for _, holder, key in _leaves(state):
        if dataclasses.is_dataclass(holder) and holder.__dataclass_fields__[str(key)].metadata.get("waits"):
            vector = getattr(holder, str(key))
            if vector.numel():
                found.append(vector)
    return found


def restore_(state: Any, stored: Mapping[str, Leaf]) -> None:
    """Overwrite the leaves of `state` with `stored`: tensors in place, numbers by assignment.

    Raises:
        CheckpointError: a path is missing or surplus, or a tensor has another shape or type.

    """
    places = {path: (holder, key) for path, holder, key in _leaves(state)}
    if places.keys() != stored.keys():
        missing, surplus = sorted(places.keys() - stored.keys()), sorted(stored.keys() - places.keys())
        raise CheckpointError(f"the stored state is another one: missing {missing}, not expected {surplus}")
    for path, (holder, key) in places.items():
        value = stored[path]
        current = getattr(holder, key) if isinstance(key, str) else holder[key]
        if isinstance(current, Tensor):
            if not isinstance(value, Tensor) or value.shape != current.shape or value.dtype != current.dtype:
                raise CheckpointError(f"the stored {path!r} does not fit: {_kind(value)} instead of {_kind(current)}")
            current.copy_(value)
        elif type(value) is not type(current):
            raise CheckpointError(f"the stored {path!r} does not fit: {_kind(value)} instead of {_kind(current)}")
        elif isinstance(key, str):
            setattr(holder, key, value)
        else:
            holder[key] = value


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any, str | int]]:
    """Yield ``(path, holder, key)`` for every leaf below `node`, in order."""
    if node is None:
        return
    if dataclasses.is_dataclass(node):
        children: list[tuple[str | int, Any]] = [
            (field.name, getattr(node, field.name))
            for field in dataclasses.fields(node)
            if not field.metadata.get("scratch")
        ]
    elif isinstance(node, list):
        children = list(enumerate(node))
    else:
        raise CheckpointError(f"the state {path!r} is a {type(node).__name__}, which cannot be stored")
    for key, child in children:
        below = f"{path}/{key}" if path else str(key)
        if isinstance(child, Leaf):
            yield below, node, key
        else:
            yield from _leaves(child, below)


def _kind(value: Leaf) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
