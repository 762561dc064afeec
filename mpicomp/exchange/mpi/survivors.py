"""How the surviving ranks continue after others have died: detection, agreement, a new world.

Every rank watches the processes of the others on its machine. A process that is seen dead is dead, and every rank of
the machine sees it soon. With ULFM, MPI's tolerance of faults, MPI knows of deaths on all machines. Collective
operations on the old communicator can no longer complete. So each wait also looks for deaths and raises RankLost, and
the run on each survivor returns to the place where it regroups:

    in step, ULFM   MPI_Comm_shrink: agreement and new communicator in one. If another rank dies while the survivors
                    rebuild, the new communicator is revoked, which ends all waits for it, and they begin again
    else            each survivor sends the others the list of dead ranks that it has seen, until all lists are equal;
                    then MPI_Comm_create_group, which is collective on the members of the new group only, or with ULFM
                    MPI_Comm_shrink. If another rank dies while they rebuild, the run ends: a thread watches for this

Exchanges, mailboxes and counters are made anew; the old ones cannot be freed, and MPI cannot be finalized. Regrouping
and rebuilding take 4 to 40 ms (4 ranks on 2 cores).

Ranks whose network is cut take the others for dead, and those take them for dead. Which side goes on is for the run to
say (`mpicomp.run.context`).

The launcher must not end the survivors. Open MPI 5.0.11 does not with ``mpiexec --with-ft ulfm``. Without this option
it ends all ranks when one has died, as MPICH 5.0.2 does (``-disable-auto-cleanup`` changes nothing), unless a shell
that outlives its rank hides the death from the launcher. All three ways were tried, with rank 0, another rank, and two
ranks one after the other.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from mpicomp.errors import ExchangeError, RankLost
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import LOOK_S, poll
from mpicomp.exchange.process import Process
from mpicomp.exchange.watchdog import Waiting

NOTICE_S = 5.0
"""Seconds that may pass between the moments at which MPI and the operating system notice a death."""

_ULFM = "OMPI_MCA_mpi_ft_enable"
"""The environment variable that ``mpiexec --with-ft ulfm`` sets."""

HAS_ULFM = os.environ.get(_ULFM, "0") not in ("0", "false")
"""Whether MPI tolerates faults."""

_TAG = 1
"""The tag of the messages in which ranks agree. Those of `NeighborExchange` on the same communicator have tag 0."""


class Survivors:
    """The `FailureDetector` of a world whose ranks are all on this machine, or for `FaultTolerantSurvivors` on several.

    Args:
        world: the ranks.
        names: the name of each rank, for messages.
        processes: the process of each rank; of those of this machine, if there are several.

    """

    def __init__(self, world: Communicator, names: Sequence[str], processes: Mapping[int, Process]) -> None:
        self.has_lost_ranks = False
        self._world = world
        self._names = list(names)
        self._processes = dict(processes)
        # Keep the buffers of abandoned operations: MPI may still write into them.
        self._given_up: list[MPI.Request] = []

    def look(self) -> None:
        """Raise RankLost if a rank has died."""
        if dead := sorted(self._dead()):
            names = ", ".join(self._names[rank] for rank in dead)
            raise RankLost(f"{names} {'has' if len(dead) == 1 else 'have'} died", tuple(dead))

    @contextmanager
    def watching(self, requests: Sequence[MPI.Request] = ()) -> Iterator[None]:
        """Raise RankLost if MPI fails in the block because a rank has died; keep what it may still write into."""
        try:
            yield
        except (ExchangeError, MPI.Exception) as error:
            self._given_up += requests
            if not isinstance(error, RankLost):
                self._explain()
            if isinstance(error, MPI.Exception):
                raise ExchangeError(f"MPI failed: {error.Get_error_string()}") from error
            raise

    @contextmanager
    def regrouped(self) -> Iterator[list[str]]:
        """Make the world one of the survivors, and end the run if another rank dies in the block; see the base."""
        dead = self._agree()
        names = [self._names[rank] for rank in sorted(dead)]
        mine = self._forget(dead)
        is_over = threading.Event()
        sentry = threading.Thread(target=self._watch, args=(mine, is_over), name="sentry", daemon=True)
        sentry.start()
        try:
            self.has_lost_ranks = True
            self._world.join_(self._communicator(dead))
            yield names
        finally:
            is_over.set()
            sentry.join()

    def _forget(self, dead: set[int]) -> int:
        """Number the ranks anew without the dead ones; return this rank's new number."""
        alive = [rank for rank in range(len(self._names)) if rank not in dead]
        self._names = [self._names[rank] for rank in alive]
        seen = self._processes
        self._processes = {new: seen[rank] for new, rank in enumerate(alive) if rank in seen}
        return alive.index(self._world.rank)

    def _dead(self, me: int | None = None) -> set[int]:
        me = self._world.rank if me is None else me
        return {rank for rank, process in self._processes.items() if rank != me and not process.is_alive()}

    def _explain(self) -> None:
        """Raise RankLost if a rank has died; with ULFM, MPI may notice it first."""
        deadline = time.monotonic() + NOTICE_S
        while time.monotonic() < deadline:
            self.look()
            time.sleep(LOOK_S / 10)

    def _agree(self) -> set[int]:
        """Return the dead ranks, after all survivors have agreed on them."""
        dead = self._dead()
        while True:
            votes = self._vote(dead)
            seen = self._dead().union(*votes)
            if seen == dead and all(vote == dead for vote in votes):
                return dead
            dead |= seen

    def _vote(self, dead: set[int]) -> list[set[int]]:
        """Send `dead` to all living ranks, and return their lists."""
        world = self._world
        others = [rank for rank in range(world.size) if rank != world.rank and rank not in dead]
        mine = np.zeros(world.size, dtype=np.uint8)
        mine[list(dead)] = 1
        votes = {other: np.zeros_like(mine) for other in others}
        missing = {other: world.comm.Irecv(vote, other, _TAG) for other, vote in votes.items()}
        sent = [world.comm.Isend(mine, other, _TAG) for other in others]
        self._given_up += [*missing.values(), *sent]

        def is_over() -> bool:
            for other, request in list(missing.items()):
                if _is_complete(request):
                    del missing[other]
            return not missing

        with Waiting("agreement on who has died", missing.keys):
            while not poll(is_over, LOOK_S):
                for rank in self._dead() & missing.keys():
                    del missing[rank], votes[rank]
        return [{int(rank) for rank in np.flatnonzero(vote)} for vote in votes.values()]

    def _communicator(self, dead: set[int]) -> MPI.Intracomm:
        comm = self._world.comm
        try:
            if not HAS_ULFM:
                return comm.Create_group(comm.Get_group().Excl(sorted(dead)), _TAG)
            poll(lambda: comm.Get_failed().size >= len(dead), NOTICE_S)
            made = MPI.Intracomm(comm.Shrink())  # Open MPI then refuses Create_group
        except MPI.Exception as error:
            raise _cannot_regroup(error) from error
        if made.size != comm.size - len(dead):
            raise ExchangeError(f"MPI counts {made.size} survivors, and the machine {comm.size - len(dead)}")
        return made

    def _watch(self, me: int, is_over: threading.Event) -> None:
        """End this process if a rank dies; the others do the same."""
        while not is_over.wait(LOOK_S):
            if dead := self._dead(me):
                names = ", ".join(self._names[rank] for rank in sorted(dead))
                sys.stdout.flush()
                sys.stderr.write(
                    f"mpicomp: error: {names} died while the survivors of another rank regrouped: go on from the "
                    "last checkpoint with --resume\n"
                )
                sys.stderr.flush()
                os._exit(ExchangeError.exit_code)


class FaultTolerantSurvivors(Survivors):
    """The `FailureDetector` of a world whose ranks may be on several machines, with an MPI that tolerates faults.

    It is for ranks that make no call that blocks when they rebuild.
    """

    def __init__(self, world: Communicator, names: Sequence[str], processes: Mapping[int, Process]) -> None:
        super().__init__(world, names, processes)
        self._lost: list[str] = []  # since the last block that came to its end

    @contextmanager
    def regrouped(self) -> Iterator[list[str]]:
        """Make the world one of the survivors; raise RankLost if another rank dies in the block; see the base."""
        old = self._world.comm
        try:
            made = MPI.Intracomm(old.Shrink())
        except MPI.Exception as error:
            raise _cannot_regroup(error) from error
        left = MPI.Group.Translate_ranks(made.Get_group(), None, old.Get_group())
        dead = set(range(old.size)) - set(left)
        self._lost += [self._names[rank] for rank in sorted(dead)]
        self.has_lost_ranks = True
        try:
            with self.watching():
                self._forget(dead)
                self._world.join_survivors_(made)
                yield list(self._lost)
        except ExchangeError:
            made.Revoke()  # others may wait for this rank in the midst of a call
            raise
        self._lost.clear()

    def _dead(self, me: int | None = None) -> set[int]:
        """Return the ranks that are dead as far as the operating system and MPI know."""
        comm = self._world.comm
        failed = MPI.Group.Translate_ranks(comm.Get_failed(), None, comm.Get_group())
        return super()._dead(me) | set(failed)


def _cannot_regroup(error: MPI.Exception) -> ExchangeError:
    return ExchangeError(f"MPI cannot regroup the survivors: {error.Get_error_string()}")


def _is_complete(request: MPI.Request) -> bool:
    """Return whether a message has arrived; False for one from a dead rank, which fails under ULFM."""
    try:
        return bool(request.Test())
    except MPI.Exception:
        return False
