"""Ranks that leave and come back: when, and the graph of those that are there.

An edge of an absent rank is left out, and its weight goes to the diagonal:

    W'_ij = W_ij                                          i and j there, i != j
    W'_ii = W_ii + sum of W_ij over the j that are away   i there;  1 if i is away

With a symmetric W, W' is symmetric, too, and its rows and columns sum to one: averaging preserves the mean over all
ranks, those that are away included.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from mpicomp.errors import ConfigError
from mpicomp.topology.base import Schedule, Topology

COLUMNS = ["rank", "leaves", "returns"]


@dataclass(frozen=True)
class Absence:
    """One absence of a rank.

    Attributes:
        rank: that is away.
        leaves: after so many steps of the run.
        returns: after so many steps of the run; None if it does not come back.
        line: of the trace.

    """

    rank: int
    leaves: int
    returns: int | None
    line: int


@dataclass(frozen=True)
class Absences:
    """All absences of a run."""

    absences: tuple[Absence, ...] = ()

    @classmethod
    def read(cls, path: Path, size: int) -> Absences:
        """Return those of the trace `path`, a CSV file with the columns of `COLUMNS`, for `size` ranks.

        Raises:
            ConfigError: names file and line of what is wrong.

        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                lines = csv.reader(file)
                if (columns := next(lines, [])) != COLUMNS:
                    raise ConfigError(
                        f"{path}, line 1: must be {','.join(COLUMNS)!r}, the columns, and is {','.join(columns)!r}"
                    )
                found = [_absence(row, size, f"{path}, line {lines.line_num}", lines.line_num) for row in lines if row]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"simulation.churn = {str(path)!r}: cannot be read: {error}") from error
        _check_overlap(found, path)
        absences = cls(tuple(found))
        for absence in found:  # the number of ranks that are away grows only where one leaves
            if len(absences.away(absence.leaves)) == size:
                raise ConfigError(
                    f"{path}, line {absence.line}: with rank {absence.rank}, all {size} ranks are away after "
                    f"{absence.leaves} steps: one must be there in every step"
                )
        return absences

    def away(self, step: int) -> frozenset[int]:
        """Return the ranks that are away in `step`, counted from 0."""
        return frozenset(
            each.rank for each in self.absences if each.leaves <= step and (each.returns is None or step < each.returns)
        )


def _absence(row: list[str], size: int, place: str, line: int) -> Absence:
    if len(row) != len(COLUMNS):
        raise ConfigError(f"{place}: has {len(row)} entries, and must have {len(COLUMNS)}: {','.join(COLUMNS)}")
    numbers: list[int | None] = []
    for name, text in zip(COLUMNS, row, strict=True):
        text = text.strip()
        if not (text.isascii() and text.isdigit()) and (name != "returns" or text):
            never = ", or nothing if the rank does not come back" if name == "returns" else ""
            raise ConfigError(f"{place}: {name} = {text!r} must be a whole number of at least 0{never}")
        numbers.append(int(text) if text else None)
    rank, leaves, returns = numbers
    assert rank is not None and leaves is not None
    if rank >= size:
        raise ConfigError(f"{place}: there is no rank {rank} among {size} ranks, which are 0 to {size - 1}")
    if returns is not None and returns <= leaves:
        raise ConfigError(f"{place}: returns = {returns} must be after leaves = {leaves}")
    return Absence(rank, leaves, returns, line)


def _check_overlap(absences: list[Absence], path: Path) -> None:
    """Raise ConfigError if a rank leaves that is away."""
    of_rank: defaultdict[int, list[Absence]] = defaultdict(list)
    for absence in sorted(absences, key=lambda each: each.leaves):
        of_rank[absence.rank].append(absence)
    for each in of_rank.values():
        for one, other in pairwise(each):
            if one.returns is None or other.leaves < one.returns:
                raise ConfigError(
                    f"{path}, line {other.line}: rank {other.rank} leaves after {other.leaves} steps, but is away "
                    f"then: see line {one.line}"
                )


@dataclass(frozen=True)
class WithAbsences:
    """A schedule whose graphs leave out the ranks that are away.

    Attributes:
        schedule: of all ranks, with symmetric weights.
        absences: who is away when.
        period: the steps from one graph to the next: those from one mixing of local SGD to the next.

    """

    schedule: Schedule
    absences: Absences
    period: int = 1

    @property
    def name(self) -> str:
        """That of the schedule of all ranks."""
        return self.schedule.name

    @property
    def size(self) -> int:
        """The number of ranks, with those that are away."""
        return self.schedule.size

    @property
    def union(self) -> Topology:
        """That of the schedule of all ranks."""
        return self.schedule.union

    def __call__(self, step: int) -> Topology:
        """Return the graph number `step`, that of the last of its `period` steps."""
        away = self.absences.away((step + 1) * self.period - 1)
        topology = self.schedule(step)
        return without(topology, away) if away else topology


@lru_cache(maxsize=64)
def without(topology: Topology, away: frozenset[int]) -> Topology:
    """Return the graph of the ranks that are not `away`, with the numbers that they have."""
    matrix, is_away = topology.matrix, np.zeros(topology.size, dtype=bool)
    is_away[list(away)] = True
    kept = ~(is_away[matrix.rows] | is_away[matrix.indices])
    off_diagonal = matrix.rows != matrix.indices
    dropped = off_diagonal & ~kept
    lost = np.bincount(matrix.rows[dropped], weights=matrix.values[dropped], minlength=matrix.size)
    diagonal = matrix.diagonal() + lost
    diagonal[list(away)] = 1.0  # not only to rounding: the model of an absent rank stays as it is
    return Topology(topology.name, matrix.only(off_diagonal & kept).with_diagonal(diagonal))
