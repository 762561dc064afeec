"""The ranks with which a run was started, and those that are left; stored in its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpicomp.state import Leaf
from mpicomp.topology import induced
from mpicomp.topology.base import Schedule, Topology

MEMBERSHIP = "data/crew"
"""The path in a checkpoint."""


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
    def of(cls, stored: Mapping[str, Leaf], size: int) -> ElasticMembership:
        """Return the membership of `size` ranks that is `stored` in a checkpoint, else that at the start of a run."""
        membership = cls(size, list(range(size)))
        if (text := stored.get(MEMBERSHIP)) is None:
            return membership
        found = cls(**json.loads(str(text)))
        return found if len(found.left) == size else dataclasses.replace(membership, lost=found.lost)

    def leaves(self) -> dict[str, Leaf]:
        """Return the leaves for a checkpoint."""
        return {MEMBERSHIP: json.dumps(vars(self))}

    def lose(self, dead: Sequence[int], names: Sequence[str]) -> None:
        """Remove the ranks `dead`, given by their present numbers, and add their `names` to `lost`."""
        self.left = [then for rank, then in enumerate(self.left) if rank not in dead]
        self.lost += names

    def graph(self, schedule: Schedule) -> Topology:
        """Return the graph of the remaining ranks, made from the `schedule` of the start."""
        return induced(schedule.union, self.left)
