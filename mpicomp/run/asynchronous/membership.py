"""The ranks that a run was started with, and which of them are left; stored with its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpicomp.checkpoint.folder import Checkpoint
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.state import Leaf
from mpicomp.topology import induced
from mpicomp.topology.base import Schedule, Topology

_PATH = "data/crew"


@dataclass
class ElasticMembership:
    """The ranks of a run.

    Attributes:
        size: how many it was started with.
        left: the numbers that the ranks of today had then.
        lost: who has died, in words.
        taken: how many batches these had taken from the pile.

    """

    size: int
    left: list[int]
    lost: list[str] = field(default_factory=list)
    taken: int = 0

    @classmethod
    def of(cls, world: World, checkpoint: Checkpoint | None) -> ElasticMembership:
        """Return that of a run that starts, or goes on from `checkpoint`; collective on all ranks."""
        membership = cls(world.size, list(range(world.size)))
        if checkpoint and checkpoint.manifest.size == world.size:
            with together(world):
                membership = cls(
                    **json.loads(str(checkpoint.read(world.rank, {_PATH}).get(_PATH, json.dumps(vars(membership)))))
                )
        return membership

    def leaves(self) -> dict[str, Leaf]:
        """Return what a checkpoint must have of it."""
        return {_PATH: json.dumps(vars(self))}

    def lose(self, dead: Sequence[int], names: Sequence[str]) -> None:
        """Do without the ranks that are `dead`, by today's numbers."""
        self.left = [then for rank, then in enumerate(self.left) if rank not in dead]
        self.lost += names

    def graph(self, schedule: Schedule) -> Topology:
        """Return what is left of `schedule`, the graph that the run was started with."""
        return induced(schedule.union, self.left)
