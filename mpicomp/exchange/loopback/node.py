"""A node of the loopback: its ranks read each other's vectors in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpicomp.exchange.base import Groups, check_schedule, mean_in_order
from mpicomp.exchange.loopback.exchange import LoopbackExchange
from mpicomp.exchange.loopback.scheduler import Message, Scheduler
from mpicomp.timing import timed
from mpicomp.topology.base import Schedule


class LoopbackNode:
    """The `Node` of one thread.

    Args:
        scheduler: of all ranks.
        rank: this one.
        number: of the messages inside the node, among the exchanges of the world.
        groups: the ranks of each node.
        device: of the vectors.

    """

    def __init__(self, scheduler: Scheduler, rank: int, number: int, groups: Groups, device: torch.device) -> None:
        self.groups = groups
        self.number = next(place for place, group in enumerate(groups) if rank in group)
        self._mates = groups[self.number]
        self.place = self._mates.index(rank)
        self.size = len(self._mates)
        self._scheduler = scheduler
        self._rank = rank
        self._number = number
        self._device = device

    def exchange(self, schedule: Schedule) -> LoopbackExchange:
        """Return the exchange between nodes over the edges of `schedule`."""
        check_schedule(schedule, len(self.groups))
        ranks = [group[self.place] for group in self.groups]
        return LoopbackExchange(self._scheduler, self.number, self._number + 1, schedule, self._device, ranks)

    @timed("exchange", "mean_shard")
    def mean_shard_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Average the shard of this rank over the ranks of the node, in float64 and in their order."""
        # Mates read their own shards of `x` in place. This rank changes those only after it has heard of each mate
        # again, in `gather_shards_`, which it calls before the next gradient.
        own = shards[self.place]
        arrived = self._swap({place: x.detach()[shards[place]] for place in self._others})
        x.detach()[own] = mean_in_order([arrived.get(place, x.detach()[own]) for place in range(self.size)])

    @timed("exchange", "gather_shards")
    def gather_shards_(self, x: Tensor, shards: Sequence[slice]) -> None:
        """Overwrite each shard with that of the rank that owns it."""
        own = x.detach()[shards[self.place]].clone()  # this rank may change its shard while a mate still reads it
        for place, shard in self._swap(dict.fromkeys(self._others, own)).items():
            x.detach()[shards[place]] = shard

    @property
    def _others(self) -> list[int]:
        return [place for place in range(self.size) if place != self.place]

    def _swap(self, pieces: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Give each mate, by place, its piece, and return those that the mates give."""
        wires = {place: piece.view(torch.uint8) for place, piece in pieces.items()}
        messages = {self._mates[place]: Message(wire, wire.numel(), 1, []) for place, wire in wires.items()}
        self._scheduler.post((self._number, self._rank), messages)
        senders = [(self._number, self._mates[place]) for place in pieces]
        dtype = next(iter(pieces.values())).dtype if pieces else torch.uint8
        arrived = self._scheduler.take(self._rank, senders)
        return {place: message.wire.view(dtype) for place, message in zip(pieces, arrived, strict=True)}
