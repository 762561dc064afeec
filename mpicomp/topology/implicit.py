"""Graphs whose edges follow from a rule, so that no rank stores them: the complete graph, and one random matching."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from mpicomp.topology.base import Topology
from mpicomp.topology.sparse import BLOCK, SparseMatrix

ROUNDS = 12
"""How often a matching's permutation mixes the bits of a rank: from 10 on, no pair of 9 or more ranks is rarer."""

ROUNDS_OF_FEW = 24
"""The same of up to 8 ranks, whose halves have a bit or two: with 12, pairs of 5 and 6 ranks differ by a twentieth."""

MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Of the mixing of 64 bits by SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2714064.2660195)."""

WORD = (1 << 64) - 1


class Implicit(Topology):
    """A graph whose weights are symmetric by its rule; its rows sum to one, and so do its columns."""

    def targets(self, rank: int) -> list[int]:
        """Return the sources of `rank`."""
        return self.sources(rank)

    @property
    def is_symmetric(self) -> bool:
        """True."""
        return True

    @property
    def is_column_stochastic(self) -> bool:
        """True: columns are rows."""
        return True

    @property
    def is_doubly_stochastic(self) -> bool:
        """True: columns are rows."""
        return True


class Complete(Implicit):
    """The graph with all edges, and one weight for all others.

    Args:
        name: for messages and results.
        weight: that a rank gives to each other rank.
        own: that each rank gives to itself, (size,).

    """

    def __init__(self, name: str, weight: float, own: np.ndarray) -> None:
        self.name = name
        self.dims = self.periods = None
        self.other_weight = weight
        self.own_weights = own

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.own_weights)

    @cached_property
    def matrix(self) -> SparseMatrix:
        """W, which takes memory by the square of the ranks."""
        return SparseMatrix.from_dense(np.concatenate(list(self._dense_blocks())))

    def weight(self, rank: int, source: int) -> float:
        """Return the weight that `rank` gives to what `source` sends."""
        return float(self.own_weights[rank]) if rank == source else self.other_weight

    def sources(self, rank: int) -> list[int]:
        """Return all other ranks, ascending."""
        return [*range(rank), *range(rank + 1, self.size)]

    @property
    def is_connected(self) -> bool:
        """True."""
        return True

    @property
    def edges_digest(self) -> str:
        """A digest of who hears whom: the number of ranks says it."""
        return f"complete {self.size}"

    def _dense_blocks(self) -> Iterator[np.ndarray]:
        step = max(1, BLOCK // self.size)
        for begin in range(0, self.size, step):
            own = self.own_weights[begin : begin + step]
            block = np.full((len(own), self.size), self.other_weight)
            block[np.arange(len(own)), np.arange(begin, begin + len(own))] = own
            yield block


class Matching(Implicit):
    """Disjoint pairs that average, with weights 1/2; with an odd number of ranks one has no partner.

    A pseudo-random permutation P of the ranks pairs the ranks of the places 0 and 1, 2 and 3, and so on: the partner of
    rank i is ``P^-1(P(i) xor 1)``. P is a Feistel network over the bits of a rank (Luby and Rackoff 1988,
    doi 10.1137/0217022), repeated until it falls among the ranks (cycle walking: Black and Rogaway 2002,
    doi 10.1007/3-540-45760-7_9). So a rank finds its partner in constant time.

    Args:
        name: for messages and results.
        size: the number of ranks.
        key: what the permutation depends on.

    """

    def __init__(self, name: str, size: int, key: bytes) -> None:
        self.name = name
        self.dims = self.periods = None
        self._size = size
        bits = (size - 1).bit_length()
        rounds = ROUNDS if bits > 3 else ROUNDS_OF_FEW
        self._keys = struct.unpack(f"<{rounds}Q", hashlib.shake_128(key).digest(8 * rounds))
        # One half of the bits changes the other in turns; with an odd number of bits one has one more.
        low = (1 << bits // 2) - 1
        high = ((1 << bits) - 1) ^ low
        self._rounds = [(high, low, key) if number % 2 else (low, high, key) for number, key in enumerate(self._keys)]
        self._partners: dict[int, int | None] = {}

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._size

    def partner(self, rank: int) -> int | None:
        """Return the rank with which `rank` averages; None if it rests."""
        try:
            return self._partners[rank]
        except KeyError:
            place = self._permute(rank, self._rounds) ^ 1
            # Each round takes itself back.
            found = self._permute(place, self._rounds[::-1]) if place < self._size else None
            self._partners[rank] = found
            if found is not None:
                self._partners[found] = rank
            return found

    def _permute(self, x: int, rounds: list[tuple[int, int, int]]) -> int:
        """Return P(x), or with the rounds in reverse P^-1(x)."""
        first, second = MULTIPLIERS
        while True:
            for half, other, key in rounds:
                mixed = ((x & half) ^ key) * first & WORD
                mixed = (mixed ^ (mixed >> 27)) * second & WORD
                # The upper bits of a product are mixed best.
                x ^= (mixed >> 32) & other
            if x < self._size:
                return x

    @cached_property
    def matrix(self) -> SparseMatrix:
        """W, two entries for each rank."""
        ranks = np.arange(self._size)
        partners = np.array([rank if (other := self.partner(rank)) is None else other for rank in range(self._size)])
        pairs = SparseMatrix.from_edges(self._size, np.append(ranks, ranks), np.append(ranks, partners))
        return SparseMatrix(pairs.indptr, pairs.indices, 1 / pairs.counts[pairs.rows])

    def weight(self, rank: int, source: int) -> float:
        """Return the weight that `rank` gives to what `source` sends."""
        partner = self.partner(rank)
        if rank == source:
            return 1.0 if partner is None else 0.5
        return 0.5 if source == partner else 0.0

    def sources(self, rank: int) -> list[int]:
        """Return the partner of `rank`, if it has one."""
        partner = self.partner(rank)
        return [] if partner is None else [partner]

    @property
    def edges_digest(self) -> str:
        """A digest of who hears whom: size and key of the permutation say it."""
        return f"matching {self._size} {self._keys}"
