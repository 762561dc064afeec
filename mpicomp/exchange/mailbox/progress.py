"""A thread that pokes a mailbox while its rank computes, so that long messages between hosts move meanwhile.

The thread may call MPI at the same time as the rank, so the library must provide the thread level MULTIPLE. Without
the thread, the rank pokes by itself, for example between the layers of its model.
"""

from __future__ import annotations

import atexit
import threading

from mpicomp.errors import ConfigError
from mpicomp.exchange.mailbox.slots import SlotMailbox
from mpicomp.exchange.mpi.library import MPI

INTERVAL_S = 1e-3
"""Seconds between pokes: at 0.1 ms a computing rank loses up to a quarter of its core, at 1 ms a few percent."""


def is_possible() -> bool:
    """Return whether two threads may call MPI at the same time."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def check_thread_level() -> None:
    """Raise `ConfigError` unless two threads may call MPI at the same time."""
    if not is_possible():
        raise ConfigError(
            "progress = 'thread' needs an MPI that provides the thread level 'multiple', and this one was started "
            "without: set MPI4PY_RC_THREAD_LEVEL=multiple in the environment, or take progress = 'poke'"
        )


class ProgressThread:
    """Pokes `mailbox` until `stop`, or until the program ends, because MPI must not end while a thread uses it."""

    def __init__(self, mailbox: SlotMailbox) -> None:
        self._mailbox = mailbox
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="mailbox progress", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread, and wait for it."""
        self._is_over.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _serve(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            try:
                self._mailbox.poke()
            except BaseException as error:
                self._mailbox.failure = error
                return
