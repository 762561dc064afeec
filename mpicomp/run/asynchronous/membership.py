"""The ranks with which a run was started, and those that are left; stored in its checkpoints."""

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
    """The ranks of a run that may lose ranks.

    Attributes:
        size: the number of ranks at the start.
        left: for each remaining rank, its number at the start.
        lost: the names of the ranks that have died.
        taken: the number of batches that these had taken from the queue.

    """

    size: int
    left: list[int]
    lost: list[str] = field(default_factory=list)
    taken: int = 0

    @classmethod
    def of(cls, world: World, checkpoint: Checkpoint | None) -> ElasticMembership:
        """Return the membership at the start of a run, or that in `checkpoint`; collective on all ranks."""
        membership = cls(world.size, list(range(world.size)))
        if checkpoint and checkpoint.manifest.size == world.size:
            with together(world):
                membership = cls(
                    **json.loads(str(checkpoint.read(world.rank, {_PATH}).get(_PATH, json.dumps(vars(membership)))))
                )
        return membership

    def leaves(self) -> dict[str, Leaf]:
        """Return the leaves for a checkpoint."""
        return {_PATH: json.dumps(vars(self))}

    def lose(self, dead: Sequence[int], names: Sequence[str]) -> None:
        """Remove the ranks `dead`, given by their present numbers, and add their `names` to `lost`."""
        self.left = [then for rank, then in enumerate(self.left) if rank not in dead]
        self.lost += names

    def graph(self, schedule: Schedule) -> Topology:
        """Return the graph of the remaining ranks, made from the `schedule` of the start."""
        return induced(schedule.union, self.left)
