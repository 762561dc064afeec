"""The lock of a run folder: two jobs that train in one folder would remove each other's files.

The system releases it when its holder dies, so nobody ever has to remove it. The file says who holds it. It goes when
the run ends in order, and is taken over if a run that was killed has left it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from mpicomp.errors import ConfigError

WAIT_S = 5.0
"""Seconds to wait for a holder that is about to end, such as a run that was just killed."""

_POLL_S = 0.1


class RunLock:
    """The lock of a run folder; of the ranks, only rank 0 holds it. Without locks in the file system it holds nothing.

    Args:
        path: of the file; its folder is that of the run.

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def take(self, wait_s: float | None = None) -> None:
        """Hold the lock until `close`, or until this process dies; a second call changes nothing.

        Args:
            wait_s: how many seconds to wait for another holder; by default `WAIT_S`.

        Raises:
            ConfigError: another run holds it.

        """
        deadline = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
        while self._file is None and not self._try():
            if time.monotonic() >= deadline:
                folder = self._path.parent
                raise ConfigError(
                    f"{folder}: another run trains in this folder: {_described(self._holder())}. Wait for its "
                    f"end, stop it (touch {folder / 'stop'}), or give another --run-dir"
                )
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Release the lock and remove the file, if this process holds it."""
        file, self._file = self._file, None
        if file is not None:
            with file, suppress(OSError):
                if self._is_current(file):
                    self._path.unlink()

    def _try(self) -> bool:
        """Return whether to go on: with the lock, or without one where there can be none."""
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError:  # a folder that cannot be written; whoever writes there says so
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if _is_predecessor(self._holder()):
                self._path.unlink(missing_ok=True)
            return False
        except OSError:  # a file system without locks
            file.close()
            return True
        if not self._is_current(file):  # its last holder has removed it meanwhile
            file.close()
            return False
        self._file = file
        with suppress(OSError):  # a full disk; whoever writes next says so
            file.truncate(0)
            file.write(json.dumps(_myself()) + "\n")
            file.flush()
        return True

    def _is_current(self, file: IO[str]) -> bool:
        """Return whether the file that is open is still the one with the name."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except OSError:
            return False

    def _holder(self) -> Mapping[str, Any]:
        """Return what the holder has written about itself; nothing if it has not, yet."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "restarts": _restarts(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _restarts() -> int:
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def _is_predecessor(holder: Mapping[str, Any]) -> bool:
    """Return whether the holder is an earlier start of this Slurm job, which is dead.

    A network file system may take minutes to notice that the node of a holder is lost.
    """
    job, restarts = holder.get("slurm_job"), holder.get("restarts")
    return job is not None and job == os.environ.get("SLURM_JOB_ID") and restarts in range(_restarts())


def _described(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "it has not said which one"
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f"PID {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('started')}"
