"""The command ``mpicomp``: parsing and printing only."""

import click


@click.group()
@click.version_option(package_name="mpicomp")
def main() -> None:
    """Train on many MPI ranks that talk only to their neighbors, in compressed messages."""
