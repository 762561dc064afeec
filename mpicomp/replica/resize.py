"""Continuing a training with another number of ranks: how the state of the new ranks is made.

All new ranks start from the same state. Rank 0 makes it from the files of all old ranks, one tensor at a time:

    parameters, batch-norm statistics      the mean (the consensus model)
    momentum, second moments               the mean
    error memory                           the mean: methods average messages, so it is what the errors add to the model
    public copies                          the consensus model, which every rank gets in one dense exchange
    state particular to a rank             made anew, as at the start
    state that only servers hold           copied unchanged to every new server
    pending messages                       an error: a method that delays messages needs as many ranks as before
    counters and other numbers             those of the old rank 0
    bytes sent                             the sum, divided evenly
    random generators of the process       seeded anew from (steps, rank)

An old rank counts in these means as it did in those of the method: by its samples if ``weights = "volume"``; in the
consensus model of SGP by its push-sum weight. A rank that never had a gradient for a parameter lacks the state that the
optimizer keeps for it; the mean is then over the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.errors import CheckpointError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.patience import patiently
from mpicomp.replica.replica import Replica
from mpicomp.replica.state import OPTIMIZER_STATE, WEIGHT, seed_random
from mpicomp.state import Leaf, resize_rules

PARAMETERS = "model/parameters"
SENT = "exchange/bytes_sent"

OWN_RULES = ("own", "counts")
"""The rules of what a rank keeps as it was at the start."""


def combine(checkpoint: Checkpoint, rules: Mapping[str, str], ranks: int) -> dict[str, Leaf]:
    """Return the state of each of `ranks` new ranks, made from the states in `checkpoint`.

    Args:
        checkpoint: of another number of ranks.
        rules: by path: ``"model"``, ``"servers"``, ``"own"`` or ``"counts"``, which are left as they are; other paths
            take the mean.
        ranks: the new number of ranks.

    Raises:
        CheckpointError: a file is damaged or missing.

    """
    old = range(checkpoint.manifest.size)
    checkpoint.check(old)
    combined = checkpoint.read_checked(0)
    held = {rank: {entry.name for entry in checkpoint.entries(rank)} for rank in old}
    for rank in old[1:]:
        more = [name for name in held[rank] - combined.keys() if name.startswith(OPTIMIZER_STATE)]
        combined.update(checkpoint.read_checked(rank, more))
    weights = _numbers(checkpoint, WEIGHT, held)
    counts = [path for path, rule in rules.items() if rule == "counts"]
    of_model = _numbers(checkpoint, counts[0], held) if counts else weights
    for path, leaf in combined.items():
        if rules.get(path) == "servers":
            errors = (cast(Tensor, checkpoint.read_checked(rank, [path])[path]) for rank in old)
            combined[path] = max(errors, key=Tensor.numel)
        elif rules.get(path) in OWN_RULES:
            continue  # each rank keeps its own, which may differ in shape
        elif isinstance(leaf, Tensor) and leaf.is_floating_point() and not path.startswith("random/"):
            found = of_model if path == PARAMETERS else weights
            holders = [rank for rank in old if path in held[rank]]
            total = torch.zeros_like(leaf, dtype=torch.float64)
            for rank in holders:
                total.add_(cast(Tensor, checkpoint.read_checked(rank, [path])[path]), alpha=found[rank])
            combined[path] = (total / sum(found[rank] for rank in holders)).to(leaf.dtype)
    for path, rule in rules.items():
        if rule == "model":
            combined[path] = cast(Tensor, combined[PARAMETERS]).clone()
    sent = [cast(int, checkpoint.read_checked(rank, [SENT])[SENT]) for rank in old]
    combined[SENT] = sum(sent) // ranks
    return combined


def _numbers(checkpoint: Checkpoint, path: str, held: Mapping[int, Collection[str]]) -> list[float]:
    """Return the number that each old rank has stored at `path`; 1 for one that has none."""
    return [
        float(checkpoint.read_checked(rank, [path])[path]) if path in names else 1.0 for rank, names in held.items()
    ]


def load_resized(gossip: Replica, checkpoint: Checkpoint, moved: Callable[[], None] = lambda: None) -> dict[str, Leaf]:
    """Give every rank the state that `combine` makes, and return it; collective on all ranks.

    `moved` is called again and again while rank 0 reads.

    Raises:
        CheckpointError: a file is damaged or missing, or is of another model or algorithm; messages are under way, or
            ranks hold shards.

    """
    if gossip.node is not None:
        raise CheckpointError(
            f"{checkpoint.path}: holds a shard of each of {checkpoint.manifest.size} ranks (topology.level = 'node'): "
            "start as many, --resize cannot deal them to others"
        )
    rules = {f"algorithm/{path}": rule for path, rule in resize_rules(gossip.state).items()}
    if "refused" in rules.values():
        raise CheckpointError(
            f"{checkpoint.path}: holds a message of each of {checkpoint.manifest.size} ranks that is under way "
            "(algorithm.overlap = true): start as many, --resize cannot deal them to others"
        )
    own = gossip.state_dict()
    rank, size = gossip.world.rank, gossip.world.size
    leaves = patiently(gossip.world, lambda: combine(checkpoint, rules, size) if rank == 0 else None, moved)
    combined = _broadcast(gossip.world, leaves)
    combined.update({path: own[path] for path, rule in rules.items() if path in combined and _keeps(own[path], rule)})
    with together(gossip.world):
        gossip.load_state_dict(combined)
    seed_random(gossip.steps, rank)
    return combined


def _keeps(leaf: Leaf, rule: str) -> bool:
    """Return whether a rank keeps its initial value of this leaf."""
    return rule in OWN_RULES or (rule == "servers" and isinstance(leaf, Tensor) and not leaf.numel())


def _broadcast(world: World, leaves: dict[str, Leaf] | None) -> dict[str, Leaf]:
    """Return rank 0's `leaves` on every rank."""
    kinds = world.broadcast(
        {path: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for path, leaf in leaves.items()}
        if leaves is not None
        else None
    )
    assert kinds is not None
    received: dict[str, Leaf] = {}
    for path, kind in kinds.items():
        if isinstance(kind, tuple):
            received[path] = (
                cast(Tensor, leaves[path]).clone() if leaves is not None else torch.empty(kind[0], dtype=kind[1])
            )
            world.broadcast_(cast(Tensor, received[path]))
        else:
            received[path] = kind
    return received
