"""At which numbers of ranks each MPI library has the tests that go over all methods.

How an exchange, a sum, a mailbox or a window may go wrong depends on the pair of library and ranks: their contracts run
on both libraries at every number of ranks. A method only calls these, so each has both libraries and every number of
ranks, but not every pair: MPICH has 2, 3 and 5 ranks, Open MPI has 1 and 2, because its ranks are slow where they
outnumber the cores. Any other number, such as 4, has all methods on both.
"""

from mpicomp.exchange.mpi.library import MPI

IS_OPEN_MPI = MPI.Get_library_version().startswith("Open MPI")
LEFT_TO_THE_OTHER = {3, 5} if IS_OPEN_MPI else {1}


def at_these_ranks(methods):
    """Return the names of the methods to be tested here; none where the other library has them."""
    return [] if MPI.COMM_WORLD.size in LEFT_TO_THE_OTHER else list(methods)
