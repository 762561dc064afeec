"""The command ``mpicomp``: parsing and printing only.

Each command has a module of its own, imported when the command is called, because torch and MPI take seconds to start.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from mpicomp import __version__
from mpicomp.errors import MpicompError

COMMANDS: dict[str, str] = {
    "plan": "Say whether compression pays here, and which method.",
    "tune": "Find a good consensus step or learning rate in short runs.",
    "train": "Train the model of a configuration file, on all ranks of mpiexec.",
    "evaluate": "Test the model of a finished run.",
    "plot": "Draw loss, accuracy and consensus of one or more runs.",
    "checkpoint": "List, verify, show, compare, remove and export checkpoints.",
    "slurm": "Write the batch script of a run, and send it.",
    "topology": "Show a graph over ranks: neighbors, weights, spectral gap.",
    "data": "Show, fetch and check data sets.",
    "bench": "Measure kernels, exchanges and training steps on this machine.",
    "doctor": "Examine MPI, launcher and GPUs, and say what to do.",
}
"""Every command with its line of help; ``x`` is ``mpicomp.cli.x:x``."""

_DEBUG = "mpicomp.debug"


class _Lazy(click.Group):
    """A group that imports a command when it is called, and turns an MpicompError into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"mpicomp.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MpicompError as error:
            if is_debug(ctx):
                raise
            click.echo(f"mpicomp: error: {error}", err=True)
            ctx.exit(error.exit_code)


def is_debug(ctx: click.Context) -> bool:
    """Return whether to show tracebacks."""
    return bool(ctx.meta.get(_DEBUG))


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of an error.",
)

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key; may be repeated."
)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@debug_option
def main() -> None:
    """Train one model on many MPI ranks that exchange compressed messages with their neighbors."""
