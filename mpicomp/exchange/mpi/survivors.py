"""How the surviving ranks of one machine continue after others have died: detection, agreement, a new world.

Every rank watches the processes of all others. On one machine this is reliable: a process that is seen dead is dead,
and every rank sees it soon. Collective operations on the old communicator can no longer complete. So each wait also
checks the processes and raises RankLost, and the run on each survivor returns to the place where it regroups:

    agree       each survivor sends the others the list of dead ranks that it has seen, until all lists are equal
    regroup     MPI_Comm_create_group, which is collective on the members of the new group only; with ULFM
                MPI_Comm_shrink, because Open MPI then refuses the former
    rebuild     mailboxes and counters are made anew; the old ones cannot be freed, and MPI cannot be finalized

Regrouping and rebuilding use calls that block, for 4 to 40 ms (4 ranks on 2 cores). If another rank dies meanwhile, the
run ends: a thread watches for this.

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
"""Seconds between two checks of a waiting rank whether the others are alive."""

NOTICE_S = 5.0
"""Seconds that may pass between the moments at which MPI and the operating system notice a death."""

_ULFM = "OMPI_MCA_mpi_ft_enable"
"""The environment variable that ``mpiexec --with-ft ulfm`` sets."""

_TAG = 1
"""The tag of the messages in which ranks agree; the world's communicator carries no other point-to-point messages."""


class Survivors:
    """The `FailureDetector` of a world whose ranks are all on this machine.

    Args:
        world: the ranks.
        names: the name of each rank, for messages.
        processes: the process of each rank.

    """

    def __init__(self, world: Communicator, names: Sequence[str], processes: Sequence[Process]) -> None:
        self.has_lost_ranks = False
        self._world = world
        self._names = list(names)
        self._processes = list(processes)
        # Keep the buffers of abandoned operations: MPI may still write into them.
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
        """Make the world one of the survivors, and end the run if another rank dies in the block; see the base."""
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
    """Return whether a message has arrived; False for one from a dead rank, which fails under ULFM."""
    try:
        return bool(request.Test())
    except MPI.Exception:
        return False
