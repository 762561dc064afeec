"""Processes of this machine, and whether they still run. No MPI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same number by the time it began.

    Attributes:
        pid: its number, as itself sees it: another one than outside where containers hide it.
        began: clock ticks from the start of the machine to its own.

    """

    pid: int
    began: int

    @classmethod
    def own(cls) -> Process:
        """Return the process that calls this."""
        pid = os.getpid()
        found = _stat(pid)
        return cls(pid, found[1] if found else 0)

    def is_alive(self) -> bool:
        """Return whether it runs on this machine: one that has ended, but that nobody has waited for, does not."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.began


def _stat(pid: int) -> tuple[str, int] | None:
    """Return the state of a process and when it began; None if there is none of that number."""
    try:
        # The second field, the name in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    # It may end while it is being read. Other errors, as of too many open files, say nothing of it.
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return fields[0], int(fields[19])
