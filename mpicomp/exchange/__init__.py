"""HOW messages travel: between MPI ranks, or between the threads of one process.

The only folder that imports mpi4py, and only where a function of `world` or `neighbor` needs it: importing
`mpicomp.exchange`, `base`, `guard` or `loopback` does not start MPI.
"""
