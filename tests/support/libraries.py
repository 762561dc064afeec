"""At which numbers of ranks each MPI library has the tests that go over all methods.

How an exchange, a sum, a mailbox or a window may go wrong depends on the pair of library and ranks: their contracts run
on both libraries at every number of ranks. A method only calls these, so each has both libraries and every number of
ranks, but not every pair: MPICH has 2, 3 and 5 ranks, Open MPI has 1 and 2, because its ranks are slow where they
outnumber the cores. A restart depends on the method's state, and on the library for the files alone: MPICH has 2 and 3
ranks, Open MPI 2. Any other number, such as 4, has all methods on both.
"""

import pytest

from mpicomp.exchange.mpi.library import MPI

IS_OPEN_MPI = MPI.Get_library_version().startswith("Open MPI")
LEFT_TO_OTHERS = {3, 5} if IS_OPEN_MPI else {1}
RESTARTS_LEFT_TO_OTHERS = {1, 3, 5} if IS_OPEN_MPI else {1, 5}


def at_these_ranks(methods):
    """Return the names of the methods to be tested here; a skipped one where another library or size has them."""
    return _unless_left(methods, LEFT_TO_OTHERS)


def restarted_at_these_ranks(methods):
    """Return the names of the methods whose restart is to be tested here; else as `at_these_ranks`."""
    return _unless_left(methods, RESTARTS_LEFT_TO_OTHERS)


def _unless_left(methods, sizes):
    if MPI.COMM_WORLD.size not in sizes:
        return list(methods)
    skip = pytest.mark.skip(reason="another library or number of ranks has all methods: tests/support/libraries.py")
    return [pytest.param(None, marks=skip, id="all methods")]
