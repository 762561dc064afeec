"""The Slurm job of this process, as the environment and Slurm's commands describe it. No MPI."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

_COMMAND_S = 10.0
"""Seconds that a command of Slurm may take; it is not repeated if the controller is busy."""


@dataclass(frozen=True)
class Job:
    """A Slurm job.

    Attributes:
        number: its id; for a job array, the id of the task.
        name: its name.
        nodes: the number of nodes.
        tasks: the number of ranks that it was made for, or None.
        restarts: how often it was requeued.
        end_time: unix seconds at which its time limit ends it, or None.
        is_requeued: whether Slurm may requeue it; None if unknown.

    """

    number: str
    name: str
    nodes: int
    tasks: int | None
    restarts: int
    end_time: float | None
    is_requeued: bool | None


def current_job(environ: Mapping[str, str]) -> Job | None:
    """Return the job of this process, or None outside of Slurm."""
    if "SLURM_JOB_ID" not in environ:
        return None
    tasks = environ.get("SLURM_NTASKS")
    requeue = re.search(r"\bRequeue=([01])", run("scontrol", "show", "job", environ["SLURM_JOB_ID"]) or "")
    return Job(
        number=environ["SLURM_JOB_ID"],
        name=environ.get("SLURM_JOB_NAME", ""),
        nodes=int(environ.get("SLURM_JOB_NUM_NODES", "1")),
        tasks=int(tasks) if tasks else None,
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
        end_time=job_end_time(environ),
        is_requeued=requeue[1] == "1" if requeue else None,
    )


def job_end_time(environ: Mapping[str, str]) -> float | None:
    """Return when the time limit ends the job, in unix seconds; None outside of a job, or if unknown.

    Newer versions of Slurm put it into the environment. For others this calls ``squeue``, so call it on one rank only.
    """
    job, end = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return float(end)
    if job is None:
        return None
    answer = run("squeue", "--noheader", "--jobs", job, "--format", "%e")
    try:
        return datetime.fromisoformat((answer or "").split()[0]).timestamp()
    except (IndexError, ValueError):  # a job without a limit, or no squeue inside a container
        return None


def srun_speaks() -> list[str]:
    """Return the values of ``srun --mpi``, such as ``pmi2`` and ``pmix``; none without Slurm."""
    done = run("srun", "--mpi=list", stderr=subprocess.STDOUT) or ""  # some versions list on standard error
    listed = re.findall(r"^(?:srun:)?\s+(\w+)$", done.partition("specific pmix")[0], re.MULTILINE)
    return sorted(set(listed) - {"none"})


def run(*command: str, stderr: int = subprocess.DEVNULL) -> str | None:
    """Return the output of a command of Slurm; None if it is missing, fails or does not answer in time."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=_COMMAND_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
