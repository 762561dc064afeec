"""At which numbers of ranks each MPI library has the tests that go over all methods.

How an exchange, a sum, a mailbox or a window may go wrong depends on the pair of library and ranks: their contracts run
on both libraries at every number of ranks. A method only calls these, so each method has both libraries, and each number
of ranks once: 1 and 3 ranks on Open MPI, 2 and 5 on MPICH. Any other number, such as 4, has all methods on both.
"""

from mpicomp.exchange.mpi.library import MPI

IS_OPEN_MPI = MPI.Get_library_version().startswith("Open MPI")
OF_THE_OTHER = {2, 5} if IS_OPEN_MPI else {1, 3}


def once(methods):
    """Return the names of the methods to be tested here; none where the other library has them."""
    return [] if MPI.COMM_WORLD.size in OF_THE_OTHER else list(methods)
