"""``mpicomp bench``: the durations of operations, compared with the best of the machine, measured in the same run."""

from __future__ import annotations

import click

from mpicomp.cli.bench.compress import compress
from mpicomp.cli.bench.exchange import exchange
from mpicomp.cli.bench.step import step


@click.group()
def bench() -> None:
    """Measure durations, and compare them with the best of the machine, measured in the same run."""


for command in (compress, exchange, step):
    bench.add_command(command)
