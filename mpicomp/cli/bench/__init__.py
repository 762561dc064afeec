"""``mpicomp bench``: how long things take, as multiples of what the machine does at best, measured in the same run."""

from __future__ import annotations

import click

from mpicomp.cli.bench.compress import compress
from mpicomp.cli.bench.exchange import exchange
from mpicomp.cli.bench.step import step


@click.group()
def bench() -> None:
    """Measure how long things take, beside the best that the machine does, in the same run."""


for command in (compress, exchange, step):
    bench.add_command(command)
