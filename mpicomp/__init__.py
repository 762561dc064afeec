"""mpicomp: train one model on many MPI ranks that talk only to their neighbors, in compressed messages.

Importing this package starts no MPI and needs none.
"""

__version__ = "0.1.0"
