"""Processes of this machine, and whether they still run. No MPI."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process. Its start time tells it from a later process with the same number.

    Attributes:
        pid: its number, as it sees it itself; outside of a container the number may be another.
        began: clock ticks from the start of the machine to the start of the process.

    """

    pid: int
    began: int

    @classmethod
    def own(cls) -> Process:
        """Return the calling process."""
        pid = os.getpid()
        found = _stat(pid)
        return cls(pid, found[1] if found else 0)

    def is_alive(self) -> bool:
        """Return whether the process runs on this machine; a zombie does not."""
        found = _stat(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.began


def _stat(pid: int) -> tuple[str, int] | None:
    """Return the state and the start time of a process; None if there is no process with this number."""
    try:
        # The second field, the name in brackets, may contain any character.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    # The process may end during the read. Other errors, such as too many open files, do not mean that it has ended.
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return fields[0], int(fields[19])
