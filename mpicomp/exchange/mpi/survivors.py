"""The ranks of one machine that live on when others have died: how they learn of it, agree, and become a world.

Every rank looks at the processes of all others. On one machine that is an oracle: who is seen dead is dead, and is seen
dead by everybody sooner or later. A collective operation on the old communicator can never complete any more, so
nothing waits on one without looking; what waits raises RankLost, and on each survivor the run unwinds to the place
where it regroups:

    agree       each survivor tells its dead to all others, message by message, until all of them name the same
    regroup     MPI_Comm_create_group, which is collective on the members of the new group only; with ULFM
                MPI_Comm_shrink, because Open MPI then refuses the former
    rebuild     mailboxes and counters are made anew; the old ones can never be freed, nor MPI be finalized

To regroup and rebuild takes calls that block, for 4 to 40 ms (4 ranks on 2 cores). A rank that dies meanwhile ends the
run: a thread looks.

The launcher must let the survivors live. Open MPI 5.0.11 does with ``mpiexec --with-ft ulfm``; without it, it kills all
ranks when one has died, as MPICH 5.0.2 does (``-disable-auto-cleanup`` changes nothing), unless a shell that outlives
its rank keeps the death from the launcher. All three ways were tried, with rank 0, another rank, or two ranks in turn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mpicomp.errors import ExchangeError, RankLost
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.wait import poll
from mpicomp.exchange.process import Process
from mpicomp.exchange.watchdog import Waiting

LOOK_S = 0.2
"""How often a rank that waits looks whether the others live."""

NOTICE_S = 5.0
"""How long MPI may know of a death, or the machine, before the other one does."""

_ULFM = "OMPI_MCA_mpi_ft_enable"
"""What ``mpiexec --with-ft ulfm`` sets."""

_TAG = 1
"""Of the messages in which ranks agree; a communicator of a world has no others from rank to rank."""


class Survivors:
    """The `FailureDetector` of a world whose ranks are all on this machine.

    Args:
        world: the ranks.
        names: of each rank, for people.
        processes: of each rank.

    """

    def __init__(self, world: Communicator, names: Sequence[str], processes: Sequence[Process]) -> None:
        self.has_lost_ranks = False
        self._world = world
        self._names = list(names)
        self._processes = list(processes)
        # MPI may yet write into the buffers of operations that were given up.
        self._given_up: list[MPI.Request] = []

    def look(self) -> None:
        """Raise RankLost if a rank has died."""
        if dead := sorted(self._dead()):
            names = ", ".join(self._names[rank] for rank in dead)
            raise RankLost(f"{names} {'has' if len(dead) == 1 else 'have'} died", tuple(dead))

    def test(self, request: MPI.Request) -> bool:
        """Return whether `request` is complete; raise RankLost if it fails because a rank has died."""
        try:
            return bool(request.Test())
        except MPI.Exception as error:
            self._explain()
            raise ExchangeError(f"MPI failed: {error.Get_error_string()}") from error

    def wait(self, request: MPI.Request, operation: str) -> None:
        """Wait for `request`, an operation of all ranks; raise RankLost if one has died."""
        try:
            with Waiting(operation):
                while not poll(lambda: self.test(request), LOOK_S):
                    self.look()
        except RankLost:
            self._given_up.append(request)
            raise

    @contextmanager
    def regrouped(self) -> Iterator[list[int]]:
        """Make the world that of the survivors, and watch over the block; collective on the survivors."""
        dead = self._agree()
        alive = [rank for rank in range(self._world.size) if rank not in dead]
        self._names = [self._names[rank] for rank in alive]
        self._processes = [self._processes[rank] for rank in alive]
        mine = alive.index(self._world.rank)
        is_over = threading.Event()
        sentry = threading.Thread(target=self._watch, args=(mine, is_over), name="sentry", daemon=True)
        sentry.start()
        try:
            self.has_lost_ranks = True
            self._world.join_(self._communicator(dead))
            yield sorted(dead)
        finally:
            is_over.set()
            sentry.join()

    def _dead(self, me: int | None = None) -> set[int]:
        me = self._world.rank if me is None else me
        return {rank for rank, process in enumerate(self._processes) if rank != me and not process.is_alive()}

    def _explain(self) -> None:
        """Raise RankLost if a rank turns out to have died: with ULFM, MPI may be the first to know."""
        deadline = time.monotonic() + NOTICE_S
        while time.monotonic() < deadline:
            self.look()
            time.sleep(LOOK_S / 10)

    def _agree(self) -> set[int]:
        """Return the dead that all survivors know of."""
        dead = self._dead()
        while True:
            votes = self._vote(dead)
            seen = self._dead().union(*votes)
            if seen == dead and all(vote == dead for vote in votes):
                return dead
            dead |= seen

    def _vote(self, dead: set[int]) -> list[set[int]]:
        """Tell `dead` to all others that live, and return what they have told."""
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
            if os.environ.get(_ULFM, "0") not in ("0", "false"):
                poll(lambda: comm.Get_failed().size >= len(dead), NOTICE_S)
                made = MPI.Intracomm(comm.Shrink())
            else:
                made = comm.Create_group(comm.Get_group().Excl(sorted(dead)), _TAG)
        except MPI.Exception as error:
            raise ExchangeError(f"MPI cannot regroup the survivors: {error.Get_error_string()}") from error
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


def _is_complete(request: MPI.Request) -> bool:
    """Return whether a message has come; one from the dead, which ULFM lets fail, never does."""
    try:
        return bool(request.Test())
    except MPI.Exception:
        return False
