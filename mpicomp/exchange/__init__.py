"""Exchanges, how messages travel: between MPI ranks, or between the threads of one process.

Only this folder imports mpi4py. Importing `mpicomp.exchange`, `base`, `guard` or `loopback` does not start MPI;
importing a module that needs it, such as `mpi.world`, does.
"""
