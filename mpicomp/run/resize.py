"""A run that goes on with another number of ranks: what becomes of the state, and of the samples of an epoch.

The new ranks all start from the same state, which rank 0 makes of the files of all old ranks, one tensor at a time:

    parameters, batch-norm statistics      the mean (the consensus model)
    momentum, second moments               the mean
    error memory                           its sum over the old ranks, divided evenly: the sum is kept
    public copies                          the consensus model, which every rank gets in one dense exchange
    what only servers hold                 as it is, by every new server
    messages that are under way            refused: a method that delays them needs as many ranks as before
    counters and other numbers             those of the old rank 0
    bytes sent                             their sum, divided evenly
    random generators of the process       drawn anew from (steps, rank)

Methods take means over ranks, so what was left out before counts ``old ranks / new ranks`` times as much afterwards.

The samples of the epoch that no old rank has visited are dealt to the new ranks in turn. From the next epoch on the
partition is the one that a run with so many ranks has from its start. ``training.epochs`` and ``training.steps`` keep
their meaning: passes over the data, and steps from the start of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.folder import Checkpoint, rank_file
from mpicomp.data.partition import Indices, epoch_indices, steps_per_epoch
from mpicomp.errors import CheckpointError, MpicompError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree
from mpicomp.replica.replica import Replica
from mpicomp.replica.state import seed_random
from mpicomp.state import Leaf, resize_rules

PARAMETERS = "model/parameters"
SENT = "exchange/bytes_sent"


def combine(checkpoint: Checkpoint, rules: Mapping[str, str], ranks: int) -> dict[str, Leaf]:
    """Return one state for each of `ranks` new ranks, made of those in `checkpoint`.

    Args:
        checkpoint: of any number of ranks.
        rules: by path: ``"sum"``, ``"model"``, ``"servers"``; the mean for all others.
        ranks: the new number.

    Raises:
        CheckpointError: a file is damaged or missing.

    """
    combined = checkpoint.read(0)
    files = [checkpoint.path / rank_file(rank) for rank in range(checkpoint.manifest.size)]
    for file in files[1:]:
        hdf5.check(file, checkpoint.manifest.files[file.name])
    for path, leaf in combined.items():
        if rules.get(path) == "servers":
            held = (cast(Tensor, hdf5.read(file, names=[path])[path]) for file in files)
            combined[path] = max(held, key=Tensor.numel)
        elif isinstance(leaf, Tensor) and leaf.is_floating_point() and not path.startswith("random/"):
            total = leaf.to(torch.float64)
            for file in files[1:]:
                total += cast(Tensor, hdf5.read(file, names=[path])[path])
            divisor = ranks if rules.get(path) == "sum" else checkpoint.manifest.size
            combined[path] = (total / divisor).to(leaf.dtype)
    for path, rule in rules.items():
        if rule == "model":
            combined[path] = cast(Tensor, combined[PARAMETERS]).clone()
    sent = [cast(int, hdf5.read(file, names=[SENT])[SENT]) for file in files]
    combined[SENT] = sum(sent) // ranks
    return combined


def load_resized(gossip: Replica, checkpoint: Checkpoint) -> dict[str, Leaf]:
    """Give every rank the state that `combine` makes, and return it; collective on all ranks.

    Raises:
        CheckpointError: a file is damaged or missing, or is of another model or algorithm; messages are under way.

    """
    rules = {f"algorithm/{path}": rule for path, rule in resize_rules(gossip.state).items()}
    if "refused" in rules.values():
        raise CheckpointError(
            f"{checkpoint.path}: holds a message of each of {checkpoint.manifest.size} ranks that is under way "
            "(algorithm.overlap = true): start as many, --resize cannot deal them to others"
        )
    own = gossip.state_dict()
    leaves, error = None, None
    if gossip.world.rank == 0:
        try:
            leaves = combine(checkpoint, rules, gossip.world.size)
        except MpicompError as failure:
            error = failure
    agree(gossip.world, error)
    combined = _broadcast(gossip.world, leaves)
    combined.update({path: own[path] for path, rule in rules.items() if path in combined and _keeps(own[path], rule)})
    error = None
    try:
        gossip.load_state_dict(combined)
    except MpicompError as failure:
        error = failure
    agree(gossip.world, error)
    seed_random(gossip.steps, gossip.world.rank)
    return combined


def _keeps(leaf: Leaf, rule: str) -> bool:
    """Return whether a rank keeps what `init` gave it."""
    return rule == "own" or (rule == "servers" and isinstance(leaf, Tensor) and not leaf.numel())


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


@dataclass(frozen=True)
class Division:
    """A part of an epoch: how many ranks there were, and how many steps they made."""

    size: int
    steps: int


@dataclass(frozen=True)
class Course:
    """Where a run is in its data, if its number of ranks has changed.

    Steps are counted on without a jump, while an epoch has another number of steps now: step s is step ``s - offset``
    of a run that has had the present number of ranks from its start.

    Attributes:
        offset: see above.
        epoch: the last one that was begun with another number of ranks; -1 if there is none.
        divisions: its parts before the last change.

    """

    offset: int = 0
    epoch: int = -1
    divisions: tuple[Division, ...] = ()

    @classmethod
    def from_json(cls, text: str) -> Course:
        """Read what `to_json` gave."""
        offset, epoch, divisions = json.loads(text)
        return cls(offset, epoch, tuple(Division(*division) for division in divisions))

    def to_json(self) -> str:
        """Return this as text, for the checkpoint."""
        return json.dumps([self.offset, self.epoch, [dataclasses.astuple(division) for division in self.divisions]])


@dataclass(frozen=True)
class Deal:
    """Which samples a rank visits when; everything follows from the arguments.

    Attributes:
        split: gives the partition over a number of ranks.
        samples: in an epoch, of all ranks together.
        size: the number of ranks.
        batch_size: samples a rank and step.
        seed: of the run.
        course: where the run is.

    """

    split: Callable[[int], list[Indices]]
    samples: int
    size: int
    batch_size: int
    seed: int
    course: Course = Course()

    @property
    def per_epoch(self) -> int:
        """The steps of a whole epoch."""
        return steps_per_epoch(self.samples, self.size, self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step and the step's place in it."""
        return divmod(step - self.course.offset, self.per_epoch)

    def order(self, epoch: int, rank: int) -> Indices:
        """Return the samples that `rank` visits in `epoch`, (per_epoch * batch_size,); -1 before the divisions' end."""
        if epoch != self.course.epoch:
            return epoch_indices(self.split(self.size), self.seed, epoch, rank, self.per_epoch, self.batch_size)
        left = self._left * self.batch_size
        visited = np.full(self.per_epoch * self.batch_size - left, -1, dtype=np.int64)
        return np.concatenate([visited, self._rest[rank :: self.size][:left]])

    def resized(self, step: int, size: int) -> Deal:
        """Return how the samples are dealt to `size` ranks from `step` on."""
        epoch, place = self.position(step)
        if place == 0:
            fresh = dataclasses.replace(self, size=size)
            return dataclasses.replace(fresh, course=Course(offset=step - epoch * fresh.per_epoch))
        earlier = self.course.divisions if epoch == self.course.epoch else ()
        begun = self.per_epoch - self._left if earlier else 0
        divisions = (*earlier, Division(self.size, place - begun))
        dealt = dataclasses.replace(self, size=size, course=Course(0, epoch, divisions))
        resumed = (epoch + 1) * dealt.per_epoch - dealt._left
        return dataclasses.replace(dealt, course=dataclasses.replace(dealt.course, offset=step - resumed))

    @cached_property
    def _rest(self) -> Indices:
        """The samples of ``course.epoch`` that no division has visited, in the order in which they are dealt."""
        first, *later = self.course.divisions
        was = dataclasses.replace(self, size=first.size, course=Course())
        orders = [was.order(self.course.epoch, rank) for rank in range(first.size)]
        rest: Indices = np.stack([order[first.steps * self.batch_size :] for order in orders], axis=1).reshape(-1)
        for division in later:
            rest = rest[division.size * division.steps * self.batch_size :]
        return rest

    @property
    def _left(self) -> int:
        """The steps that ``course.epoch`` still has."""
        return len(self._rest) // (self.size * self.batch_size)
