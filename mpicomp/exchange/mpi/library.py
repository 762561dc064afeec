"""The MPI library: importing this module starts MPI.

Raises `ExchangeError` on import if there is no MPI, or if the launcher of another MPI started the process.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import mpi4py

from mpicomp.errors import ExchangeError
from mpicomp.exchange.launcher import check_after_start, check_before_start, family


def _expected_family() -> str:
    """Return the file name of the extension module that mpi4py will load; in its wheels it names the MPI."""
    try:
        spec = importlib.util.find_spec("mpi4py.MPI")
    except (ImportError, RuntimeError, OSError):
        return ""
    return Path(spec.origin).name if spec is not None and spec.origin else ""


check_before_start(family(_expected_family()), os.environ)

# On machines without RDMA hardware, Open MPI 5.0.11's UCX component for windows warns that it cannot be used. The
# warning is a false alarm: there is nothing that it could be used for (github.com/open-mpi/ompi/issues/14086).
if not Path("/sys/class/infiniband").exists():
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")

# One thread of this package calls MPI, though not always the main one. Some UCX builds refuse the default, MULTIPLE.
# The environment variable MPI4PY_RC_THREAD_LEVEL overrules this.
mpi4py.rc.thread_level = "serialized"
try:
    with warnings.catch_warnings():
        # "suspicious MPI execution environment": check_after_start raises a clearer error instead.
        warnings.simplefilter("ignore", RuntimeWarning)
        from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise ExchangeError(
        f"mpi4py finds no MPI library ({error}). Load your cluster's MPI module, or install one: pip install mpich"
    ) from error

check_after_start(family(MPI.Get_library_version()), MPI.COMM_WORLD.Get_size(), os.environ)

__all__ = ["MPI"]
