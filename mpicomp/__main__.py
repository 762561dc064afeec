"""``python -m mpicomp`` is the command ``mpicomp``."""

from mpicomp.cli import main

if __name__ == "__main__":
    main()
