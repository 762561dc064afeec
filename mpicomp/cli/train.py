"""``mpicomp train``: starts a run from a configuration file, or continues one."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from mpicomp.checkpoint.folder import Checkpoint, is_step_folder, open_checkpoint
from mpicomp.checkpoint.saver import find_checkpoint
from mpicomp.cli import debug_option, is_debug, set_option
from mpicomp.cli.run_world import run_world, threads
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree, guard, together
from mpicomp.exchange.launcher import require_one_process
from mpicomp.exchange.placement import device_of, only_gpu
from mpicomp.replica.record import Callback
from mpicomp.replica.tensorboard import TensorBoard, require_tensorboard
from mpicomp.run.folder import RunFolder
from mpicomp.run.lock import RunLock
from mpicomp.run.loop import train as train_model
from mpicomp.run.progress import Progress
from mpicomp.run.start import make_folder, open_folder
from mpicomp.run.stopping import EXIT_UNFINISHED, StopRequests
from mpicomp.slurm.job import job_end_time

AUTO = "auto"
"""``--resume auto``: continue the run if there is one, else start it."""


TRACE_STEPS = 100
"""The number of steps that ``--trace`` records by default."""


class _Duration(click.ParamType):  # type: ignore[type-arg]
    """A duration in seconds, from ``90s``, ``55m``, ``2h``, ``1d12h``, or Slurm's ``HH:MM:SS`` and ``D-HH:MM:SS``."""

    name = "duration"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        text = str(value).strip().lower()
        spelt = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
        clock = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
        match = spelt if text and spelt else clock
        if match is None:
            self.fail(f"{value!r} is not a duration: write 90s, 55m, 2h, 1d12h or D-HH:MM:SS", parameter, context)
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


@dataclass(frozen=True)
class _Request:
    """The options of the command line."""

    path: Path | None
    overrides: Sequence[str]
    run_dir: Path | None
    resume: str | None
    resize: bool
    end_time: float | None
    trace_steps: int
    tensorboard: bool
    debug: bool

    def check(self) -> None:
        """Raise ConfigError if options contradict each other, or need a package that is not installed."""
        if self.tensorboard:
            require_tensorboard()
        if self.resume is None and self.path is None:
            raise ConfigError("give a configuration file, or a run to go on with (--resume RUN_DIR)")
        if self.path is not None and self.path.is_dir():
            raise ConfigError(
                f"{self.path} is a folder: give a configuration file; or go on with the run in it: mpicomp train "
                f"--resume {self.path}"
            )
        if self.resume == AUTO and (self.path is None or self.run_dir is None):
            raise ConfigError(
                "--resume auto needs CONFIG.toml and --run-dir: the run starts from the one, or goes on in the other"
            )
        if self.resume not in (None, AUTO) and (self.path is not None or self.run_dir is not None):
            raise ConfigError(
                "--resume RUN_DIR takes the configuration and the folder of that run: leave out the others"
            )

    @property
    def resumed(self) -> Path | None:
        """The folder of a run that must or may be continued; None for a new run."""
        if self.resume == AUTO:
            return self.run_dir
        if self.resume is None:
            return None
        return Path(self.resume).parent.parent if self.names_checkpoint else Path(self.resume)

    @property
    def names_checkpoint(self) -> bool:
        """Whether ``--resume`` names a checkpoint instead of a run folder."""
        return self.resume is not None and is_step_folder(Path(self.resume))

    def load(self) -> RunConfig:
        """Read and check the configuration."""
        self.check()
        if self.path is not None:
            return RunConfig.load(self.path, self.overrides)
        assert self.resumed is not None
        return RunConfig.load(RunFolder.open(self.resumed).config_path, self.overrides)

    def make_folder(self) -> RunFolder:
        """Return the folder of the run, and make it if it does not exist; raise ConfigError if a new run finds one."""
        if self.resumed is not None:
            folder = RunFolder(self.resumed)
            folder.make()
            return folder
        if self.run_dir is not None:
            return RunFolder.create(self.run_dir)
        assert self.path is not None
        return RunFolder.create_named(self.path.stem)

    @contextmanager
    def open_callbacks(
        self, world: World, folder: RunFolder, checkpoint: Checkpoint | None
    ) -> Iterator[list[Callback]]:
        """Yield the further callbacks for records, besides folder and progress."""
        if not self.tensorboard:
            yield []
            return
        done = checkpoint.manifest.step if checkpoint else 0
        # A rank that takes the place of rank 0 later goes on where that one has ended.
        with closing(TensorBoard(folder.tensorboard_path, done if world.rank == 0 else None)) as board:
            yield [board]

    def find_checkpoint(self, world: World) -> Checkpoint | None:
        """Return the checkpoint to continue from, the same on all ranks; None for a new run. Collective."""
        if self.resumed is None:
            return None
        if self.names_checkpoint:
            with together(world):
                return open_checkpoint(Path(str(self.resume)))
        folder = RunFolder(self.resumed)
        found = find_checkpoint(world, folder.checkpoints_path)
        if found is None and self.resume != AUTO:
            remedy = f"Start it anew: mpicomp train {folder.config_path} --run-dir NEW_DIR"
            agree(world, CheckpointError(f"{folder.path}: has no checkpoint to go on from. {remedy}"))
        return found


@click.command()
@click.argument("config", type=click.Path(path_type=Path), metavar="[CONFIG.toml]", required=False)
@set_option
@click.option("--run-dir", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/CONFIG-DATE-TIME.")
@click.option(
    "--resume",
    metavar="RUN_DIR|auto",
    help="Go on with a run from its newest checkpoint, or from the one named (RUN_DIR/checkpoints/step_...); "
    "auto: go on in --run-dir if there is a checkpoint, else start CONFIG.toml there.",
)
@click.option(
    "--resize",
    is_flag=True,
    help="Go on with another number of ranks: models and momentum are averaged, compression errors divided anew.",
)
@click.option(
    "--time-limit",
    type=_Duration(),
    metavar="55m|2h|D-HH:MM:SS",
    help="Store a checkpoint and end with exit code 75 before this time is over. Default: the end of the Slurm job.",
)
@click.option(
    "--loopback",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N ranks as threads of this process, without MPI.",
)
@click.option(
    "--simulate",
    type=click.IntRange(min=1),
    metavar="N",
    help="As --loopback, in simulated time: gradients and messages take as long as the section [simulation] says.",
)
@click.option(
    "--trace", is_flag=True, help="Write a timeline of the first steps into RUN_DIR/trace, to open in ui.perfetto.dev."
)
@click.option(
    "--trace-steps",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"How many steps --trace shows, of each rank; default: {TRACE_STEPS}.",
)
@click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard, too, into RUN_DIR/tensorboard.")
@debug_option
@click.pass_context
def train(
    ctx: click.Context,
    config: Path | None,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: str | None,
    resize: bool,
    time_limit: float | None,
    loopback: int | None,
    simulate: int | None,
    trace: bool,
    trace_steps: int | None,
    tensorboard: bool,
) -> None:
    """Train the model of CONFIG.toml, or continue a run.

    Start it on several ranks with mpiexec, e.g. `mpiexec -n 4 mpicomp train configs/quickstart.toml`, or with
    --loopback. The run folder gets config.toml, metrics.jsonl, checkpoints/, result.json and model.h5.

    The signal USR1, a file named stop in the run folder, or a time limit that is near make it store a checkpoint and
    end with exit code 75, which means: run me again, with --resume.
    """
    end_time = None if time_limit is None else time.time() + time_limit
    if trace_steps is not None and not trace:
        raise ConfigError("--trace-steps goes with --trace")
    traced = (trace_steps or TRACE_STEPS) if trace else 0
    request = _Request(config, overrides, run_dir, resume, resize, end_time, traced, tensorboard, is_debug(ctx))
    size = threads(loopback, simulate)
    if size is not None:
        require_one_process()
    is_finished = _train_on_mpi(request) if size is None else _train_on_threads(request, size, simulate is not None)
    if not is_finished:
        sys.exit(EXIT_UNFINISHED)


def _train_on_threads(request: _Request, size: int, is_simulated: bool) -> bool:
    from mpicomp.exchange.loopback import run

    config = request.load()
    device = device_of(only_gpu(config.run.device))
    requests = StopRequests(config.run.stop_signal)
    links = config.simulation.links() if is_simulated else None
    return all(run(size, _train_guarded, config, request, requests, device=device, simulated=links))


def _train_guarded(world: World, config: RunConfig, request: _Request, requests: StopRequests) -> bool:
    with guard(world, debug=request.debug):
        return _train_rank(world, config, request, requests)


def _train_on_mpi(request: _Request) -> bool:
    with run_world(request.load, request.path or request.resume, debug=request.debug) as (world, config):
        is_finished = _train_rank(world, config, request, StopRequests(config.run.stop_signal))
        if world.has_lost_ranks:
            world.leave(0 if is_finished else EXIT_UNFINISHED)
    return is_finished


def _train_rank(world: World, config: RunConfig, request: _Request, requests: StopRequests) -> bool:
    """Train on one rank and return whether the run is finished; rank 0 writes and prints."""
    groups = config.topology.groups(world)
    with together(world):
        config.check(world.size, groups)
    folder = make_folder(world, request.make_folder)
    with closing(RunLock(folder.lock_path)) as lock:
        with together(world):
            if world.rank == 0:
                lock.take()
        checkpoint = request.find_checkpoint(world)
        opened = open_folder(world, config, folder, checkpoint, request.names_checkpoint)
        for line in opened.lines:
            click.echo(line)
        if opened.has_ended:
            return True
        return _train_in(folder, lock, world, config, request, requests, checkpoint)


def _train_in(
    folder: RunFolder,
    lock: RunLock,
    world: World,
    config: RunConfig,
    request: _Request,
    requests: StopRequests,
    checkpoint: Checkpoint | None,
) -> bool:
    """Train in a folder that is ready, and return whether the run is finished."""
    if world.rank == 0 or config.run.on_peer_loss == "continue":
        end_time = job_end_time(os.environ) if request.end_time is None else request.end_time
        requests.watch(folder.stop_path, end_time, config.checkpoint.stop_before_end_s)
    with request.open_callbacks(world, folder, checkpoint) as callbacks:
        go_on = partial(
            train_model,
            checkpoint=checkpoint,
            resize=request.resize,
            requests=requests,
            trace_steps=request.trace_steps,
            callbacks=callbacks,
            lock=lock,
        )
        if world.rank != 0:
            return go_on(config, world, folder) is not None
        for notice in world.notices:
            click.echo(notice)
        undo = nullcontext() if checkpoint else folder.kept_if_used()
        with undo, Progress(config.training.steps, config.training.epochs) as progress:
            return go_on(config, world, folder, progress) is not None
