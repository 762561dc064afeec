"""``mpicomp plot``: the curves of some runs in one picture."""

from __future__ import annotations

from pathlib import Path

import click

from mpicomp.cli import debug_option
from mpicomp.errors import ConfigError
from mpicomp.run.plot import figure, read_runs


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Default: plot.png in the folder of the first run.",
)
@debug_option
def plot(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw loss, test accuracy (or loss) and consensus distance of the folders RUN... against steps, bytes and seconds.

    A run that is still going on can be drawn too.
    """
    picture = figure(read_runs(runs))
    out = out or runs[0] / "plot.png"
    try:
        picture.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from error
    click.echo(f"Picture: {out}")
