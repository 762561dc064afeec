"""Which launcher started this process, and whether it fits the MPI library. Pure functions; no MPI.

With the mpiexec of another MPI, each of N processes is rank 0 of 1 (Open MPI 5.0.11 under MPICH's mpiexec), or dies in
``MPI_Init`` with a message about PMI (MPICH 5.0.2 under Open MPI's). The checks here recognize both cases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mpicomp.errors import ConfigError, ExchangeError

Family = Literal["MPICH", "Open MPI", "unknown"]

_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpiexec",
    "MV2_COMM_WORLD_SIZE": "MVAPICH's mpiexec",
    "PMI_SIZE": "MPICH's mpiexec (or srun --mpi=pmi2)",
    "FLUX_JOB_SIZE": "flux run",
    "SLURM_STEP_NUM_TASKS": "srun",
}
"""Environment variables with the number of ranks, the most specific first: mpiexec uses srun for its daemons.

``SLURM_NTASKS`` is not among them: it is set in a plain batch script and in an interactive allocation too.
"""


_PER_PROCESS = (
    "PMI",  # also PMIX
    "PRTE_",
    "HYDI_",
    "MPI_LOCAL",
    *("OMPI_COMM_", "OMPI_WORLD_", "OMPI_UNIVERSE_", "OMPI_FILE_", "OMPI_NUM_", "OMPI_MCA_num_procs"),
    *("OMPI_MCA_ess", "OMPI_MCA_orte", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir"),  # Open MPI 4's
    "MV2_COMM_",
    "FLUX_",
    "PALS_",
    "SLURM_",
)
"""How the variables begin by which a launcher and the MPI in the processes find each other."""


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which a program that this process starts is one rank alone; settings of MPI remain."""
    kept = ("PMIX_MCA_", "PRTE_MCA_", "PMIX_PREFIX")
    return {name: v for name, v in environ.items() if name.startswith(kept) or not name.startswith(_PER_PROCESS)}


def launched_by(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the launcher and the number of ranks that it reports, or None for a process started without one."""
    for variable, name in _SIZES.items():
        size = environ.get(variable, "")
        if size.isdigit():
            return name, int(size)
    return None


def require_one_process() -> None:
    """Raise ConfigError if a launcher has started several of this process, which runs its ranks as threads."""
    claim = launched_by(os.environ)
    if claim is not None and claim[1] > 1:
        raise ConfigError(
            f"{claim[0]} has started this {claim[1]} times: start it once, without one; --loopback N runs N ranks"
        )


def family(version: str) -> Family:
    """Return the family of MPI for `version`: the text of the library, or mpi4py's file name for its ABI."""
    text = version.lower().replace(" ", "")
    if "openmpi" in text:
        return "Open MPI"
    return "MPICH" if any(name in text for name in ("mpich", "intel", "cray", "mvapich")) else "unknown"


def check_before_start(library: Family, environ: Mapping[str, str]) -> None:
    """Raise `ExchangeError` if ``MPI_Init`` of `library` would abort the process because of its launcher."""
    if library == "MPICH" and "OMPI_COMM_WORLD_SIZE" in environ:
        raise _mismatch(library, *_claim(environ))


def check_after_start(library: Family, size: int, environ: Mapping[str, str]) -> None:
    """Raise `ExchangeError` if the launcher has started several ranks but MPI has `size` = 1."""
    claim = launched_by(environ)
    if size == 1 and claim is not None and claim[1] > 1:
        raise _mismatch(library, *claim)


def _claim(environ: Mapping[str, str]) -> tuple[str, int]:
    claim = launched_by(environ)
    assert claim is not None
    return claim


def _mismatch(library: Family, launcher: str, claimed: int) -> ExchangeError:
    own = Path(sys.executable).parent / "mpiexec"
    remedy = f"start with {own}" if own.exists() else f"start with the mpiexec that belongs to {library}"
    if "srun" in launcher:
        remedy += ", or let srun speak its language (see `srun --mpi=list`; Open MPI 5 needs --mpi=pmix)"
    return ExchangeError(
        f"wrong launcher: {launcher} started {claimed} processes, but the MPI library in use is {library} and does not "
        f"understand it, so that each process would run alone. Remedy: {remedy}"
    )
