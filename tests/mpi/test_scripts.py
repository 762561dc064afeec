"""The table of scripts on MPI: each row at the least number of ranks, and at 2 with MPICH, at 3 with Open MPI.

The loopback has each row at 2 and at 3 ranks (`tests/unit/replica/test_scripts.py`); what is left for MPI to get wrong
depends on the library or on the number of ranks, not on the pair of them.
"""

import pytest
from support.libraries import IS_OPEN_MPI
from support.script_table import params

from mpicomp.exchange.mpi.library import MPI

SIZE = 3 if IS_OPEN_MPI else 2


def is_for(row):
    """Whether a row is for the ranks that there are; a test that is skipped on five ranks takes time, too."""
    return MPI.COMM_WORLD.size in {row.ranks, max(row.ranks, SIZE)}


@pytest.mark.parametrize("row", [row for row in params() if is_for(*row.values)])
def test_script(row, world):
    row.check(world)
