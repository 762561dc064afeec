"""Messages between processes, by MPI."""
