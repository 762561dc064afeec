"""At which numbers of ranks each MPI library has the tests that go over all methods, and some others.

How an exchange, a sum, a mailbox or a window may go wrong depends on the pair of library and ranks: their contracts run
on both libraries at every number of ranks. A method only calls these, so each has both libraries and every number of
ranks, but not every pair: MPICH has 2, 3 and 5 ranks, Open MPI has 1 and 2, because its ranks are slow where they
outnumber the cores. On 3 ranks of MPICH, messages are staged on a simulated GPU (`tests/mpi/test_device_staging.py`).
A restart depends on the state of the method or of torch's optimizer, not on the library: MPICH has 2 and 3 ranks, and
what restarts ask of the library, the other tests of `tests/mpi/test_resume.py` have on both. Lightning has MPICH at 2
and 3 ranks, Open MPI at 1. Asynchronous methods, and sums over gloo inside nodes, have the pairs of methods. Any other
number of ranks, such as 4, has all on both.
"""

import pytest

from mpicomp.exchange.mpi.library import MPI

REASON = "another library or number of ranks has them: tests/support/libraries.py"
IS_OPEN_MPI = MPI.Get_library_version().startswith("Open MPI")
LEFT_TO_OTHERS = {3, 5} if IS_OPEN_MPI else {1}
SAME_BITS_LEFT_TO_OTHERS = LEFT_TO_OTHERS | {3}
RESTARTS_LEFT_TO_OTHERS = {1, 2, 3, 5} if IS_OPEN_MPI else {1, 5}
LIGHTNING_LEFT_TO_OTHERS = {2, 3} if IS_OPEN_MPI else {1}


def at_these_ranks(methods):
    """Return the names of the methods to be tested here; a skipped one where another library or size has them."""
    return _unless_left(methods, SAME_BITS_LEFT_TO_OTHERS)


def restarted_at_these_ranks(methods):
    """Return the names of the methods or optimizers whose restart is to be tested here; else as `at_these_ranks`."""
    return _unless_left(methods, RESTARTS_LEFT_TO_OTHERS)


def _unless_left(methods, sizes):
    if MPI.COMM_WORLD.size not in sizes:
        return list(methods)
    return [pytest.param(None, marks=pytest.mark.skip(reason=REASON), id="all methods")]


def skip_module_if_left(sizes):
    """Skip the module that calls this, where another library or size has its tests."""
    if MPI.COMM_WORLD.size in sizes:
        pytest.skip(REASON, allow_module_level=True)
