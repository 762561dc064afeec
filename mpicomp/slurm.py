"""What the environment of a process tells about its Slurm job. Pure functions of the environment; no MPI."""

from __future__ import annotations

from collections.abc import Mapping


def job_end_time(environ: Mapping[str, str]) -> float | None:
    """Return when the Slurm job will be ended, in unix seconds, or None outside of a job with a time limit."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None
