"""``mpicomp train``: one configuration file, one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from mpicomp.cli import debug_option, is_debug
from mpicomp.errors import ConfigError, MpicompError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree, guard
from mpicomp.exchange.placement import choose_device
from mpicomp.training.config import RunConfig
from mpicomp.training.loop import train as train_model
from mpicomp.training.metrics import Progress
from mpicomp.training.run_folder import RunFolder


@dataclass(frozen=True)
class _Request:
    """What the command line asks for."""

    path: Path
    overrides: Sequence[str]
    run_dir: Path | None
    debug: bool

    def load(self) -> RunConfig:
        """Read and check the configuration."""
        return RunConfig.load(self.path, self.overrides)

    def create_folder(self) -> RunFolder:
        """Make the run folder."""
        if self.run_dir is not None:
            return RunFolder.create(self.run_dir)
        return RunFolder.create_named(self.path.stem)


@click.command()
@click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a key; may be repeated.")
@click.option("--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/CONFIG-DATE-TIME.")
@click.option(
    "--loopback",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N ranks as threads of this process, without MPI.",
)
@debug_option
@click.pass_context
def train(
    ctx: click.Context, config: Path, overrides: tuple[str, ...], run_dir: Path | None, loopback: int | None
) -> None:
    """Train the model of CONFIG.toml.

    Start it on several ranks with mpiexec, e.g. `mpiexec -n 4 mpicomp train configs/quickstart.toml`, or with
    --loopback. The run folder gets config.toml, metrics.jsonl, result.json and model.h5.
    """
    request = _Request(config, overrides, run_dir, is_debug(ctx))
    if loopback is None:
        _train_on_mpi(request)
    else:
        _train_on_threads(request, loopback)


def _train_on_threads(request: _Request, size: int) -> None:
    from mpicomp.exchange.loopback import run

    config = request.load()
    device = choose_device(config.run.device, 0, torch.cuda.device_count())
    run(size, _train_guarded, config, request, device=device)


def _train_guarded(world: World, config: RunConfig, request: _Request) -> None:
    with guard(world, debug=request.debug):
        _train_rank(world, config, request)


def _train_on_mpi(request: _Request) -> None:
    from mpicomp.exchange.world import MpiWorld  # here, because it starts MPI

    # The world of the run needs a configuration; this one carries the verdict on it.
    everyone = MpiWorld.from_environment("cpu")
    with guard(everyone, debug=request.debug):
        config = _load_together(everyone, request)
        world = MpiWorld.from_environment(config.run.device, config.run.allow_shared_gpu)
        _train_rank(world, config, request)


def _load_together(world: World, request: _Request) -> RunConfig:
    """Load the configuration on every rank; the same error on all of them if one fails or reads another one."""
    config: RunConfig | None = None
    error: MpicompError | None = None
    try:
        config = request.load()
    except MpicompError as failure:
        error = failure
    agree(world, error)
    assert config is not None
    text = config.to_toml()
    differs = text != world.broadcast(text)
    agree(world, ConfigError(f"{request.path}: is not the same as on rank 0 ({world.host})") if differs else None)
    return config


def _train_rank(world: World, config: RunConfig, request: _Request) -> None:
    """Train on one rank; rank 0 writes and prints."""
    folder = _create_folder_together(world, config, request)
    if folder is None:
        train_model(config, world, None, None)
        return
    for notice in world.notices:
        click.echo(notice)
    with folder.kept_if_used(), Progress(config.training.steps, config.training.epochs) as progress:
        train_model(config, world, folder, progress)


def _create_folder_together(world: World, config: RunConfig, request: _Request) -> RunFolder | None:
    """Make the run folder on rank 0, for a run that can be; the same error on every rank otherwise."""
    folder, error = None, None
    try:
        config.check(world.size)
        if world.rank == 0:
            folder = request.create_folder()
            folder.save_config(config)
    except MpicompError as failure:
        error = failure
    agree(world, error)
    return folder
