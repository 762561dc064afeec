"""``mpicomp slurm``: the batch script of a run, printed or sent."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mpicomp.cli import debug_option, set_option
from mpicomp.errors import ConfigError, MpicompError
from mpicomp.exchange.launcher import family
from mpicomp.slurm.script import LAUNCHERS, BatchScript, Launcher

_MPI4PY_S = 60.0
"""Seconds that loading the MPI library may take; the file system of a cluster may be slow at first."""


@click.group(short_help="Write the batch script of a run, and send it.")
def slurm() -> None:
    """Write a batch script that trains a run to its end over several starts, or submit it.

    You can read and edit the script. Its job stores a checkpoint before its time limit and requeues itself until the
    training is done.
    """


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that describe a job to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS = [
    click.argument("config", type=click.Path(path_type=Path), metavar="CONFIG.toml"),
    set_option,
    click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True),
    click.option("--gpus-per-node", type=click.IntRange(min=1), help="One rank for each."),
    click.option("--ranks-per-node", type=click.IntRange(min=1), help="On the CPU."),
    click.option("--cpus-per-rank", type=click.IntRange(min=1), default=1, show_default=True),
    click.option("--time", default="", metavar="HH:MM:SS", help="Limit of one start, not of the training."),
    click.option("--partition", default=""),
    click.option("--account", default=""),
    click.option("--qos", default=""),
    click.option("--seeds", metavar="0-4|1,2,5", help="An array of runs that differ in run.seed."),
    click.option(
        "--vary", multiple=True, metavar="SECTION.KEY=V1,V2,...", help="An array; all combinations if repeated."
    ),
    click.option("--at-once", type=click.IntRange(min=1), help="How many runs of an array at the same time."),
    click.option("--requeue/--no-requeue", default=True, show_default=True, help="Run again until it is done."),
    click.option("--max-restarts", type=click.IntRange(min=1), default=100, show_default=True),
    click.option(
        "--signal",
        "signal_lead_s",
        type=click.IntRange(min=1, max=65535),
        metavar="SECONDS",
        help="When Slurm asks for the last checkpoint, before the limit. Default: 180, at most a quarter of the limit.",
    ),
    click.option(
        "--mpi",
        type=click.Choice(list(LAUNCHERS)),
        help="How to start the ranks. Default: pmi2 with MPICH, pmix with Open MPI, as this environment has it.",
    ),
    click.option("--name", help="Of the job. Default: that of CONFIG.toml."),
    click.option("--run-dir", metavar="DIR", help="Default: runs/NAME. With an array: the folder of its run folders."),
    click.option("--module", "modules", multiple=True, metavar="NAME", help="For `module load`; may be repeated."),
    click.option("--venv", default="", metavar="DIR", help="A virtual environment to activate."),
    click.option("--sbatch", multiple=True, metavar="KEY[=VALUE]", help="Any other option of sbatch; may be repeated."),
    debug_option,
]


@slurm.command(short_help="Print or write a batch script.")
@_job_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Default: print it.")
def script(out: Path | None, **options: Any) -> None:
    """Print the batch script of a run, or write it to a file."""
    text = _batch_script(**options).text()
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text)
        click.echo(f"{out}: send it with sbatch {out}")


@slurm.command(short_help="Write a batch script and send it.")
@_job_options
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Default: NAME.sbatch.")
def submit(out: Path | None, **options: Any) -> None:
    """Write the batch script of a run, send it with sbatch and print the number of the job."""
    batch = _batch_script(**options)
    out = out or Path(f"{batch.name}.sbatch")
    _write(out, batch.text())
    try:
        sent = subprocess.run(["sbatch", "--parsable", str(out)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise MpicompError(
            f"{out} is written but not sent: there is no sbatch here; send it from a login node"
        ) from error
    if sent.returncode != 0:
        raise MpicompError(f"{out} is written, but sbatch refuses it: {' '.join(sent.stderr.split())}")
    click.echo(f"job {sent.stdout.strip().split(';')[0]}: {out}, {batch.ranks} ranks, {_where(batch)}")


def _where(batch: BatchScript) -> str:
    return f"{len(batch.runs)} runs in {batch.run_dir}" if batch.vary else f"run folder {batch.run_dir}"


def _batch_script(
    config: Path,
    overrides: tuple[str, ...],
    ranks_per_node: int | None,
    gpus_per_node: int | None,
    mpi: Launcher | None,
    seeds: str | None,
    vary: tuple[str, ...],
    at_once: int | None,
    name: str | None,
    run_dir: str | None,
    **options: Any,
) -> BatchScript:
    ranks_per_node = ranks_per_node or gpus_per_node
    if ranks_per_node is None:
        raise ConfigError("give --gpus-per-node, or --ranks-per-node on the CPU: how many ranks shall a node have?")
    name = name or config.stem
    batch = BatchScript(
        config=str(config),
        name=name,
        run_dir=run_dir or f"runs/{name}",
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node or 0,
        overrides=overrides,
        vary=_varied(seeds, vary),
        at_once=at_once or 0,
        mpi=mpi or _fitting_launcher(),
        **options,
    )
    _check(config, batch)
    return batch


def _varied(seeds: str | None, vary: tuple[str, ...]) -> dict[str, list[str]]:
    varied: dict[str, list[str]] = {}
    for text in vary:
        key, _, values = text.partition("=")
        if key in varied:
            raise ConfigError(f"--vary {key} is given twice: give all its values at once, separated by commas")
        varied[key] = values.split(",")
    if seeds is not None:
        if "run.seed" in varied:
            raise ConfigError("--seeds and --vary run.seed say the same: leave one out")
        varied["run.seed"] = _seeds(seeds)
    return varied


def _seeds(text: str) -> list[str]:
    """Return the numbers in a text such as ``0-4`` or ``1,2,5``."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ConfigError(f"--seeds {text!r} must be numbers and ranges of them, such as 0-4 or 1,2,5")
        numbers += map(str, range(int(first), int(last or first) + 1))
    return numbers


def _check(config: Path, batch: BatchScript) -> None:
    """Raise ConfigError for problems that would end the job at its start."""
    from mpicomp.config.config import RunConfig  # imports torch

    for settings in batch.runs or [[]]:
        RunConfig.load(config, [*batch.overrides, *settings]).check(batch.ranks)


def _fitting_launcher() -> Launcher:
    """Return the value of ``srun --mpi`` for the MPI of this environment; another process loads it, as it may crash."""
    command = [sys.executable, "-m", "mpi4py", "--mpi-lib-version"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=_MPI4PY_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            "the MPI library of this environment does not tell its name (mpicomp doctor says more): give --mpi pmi2 "
            "for MPICH and its kin, --mpi pmix for Open MPI, --mpi mpirun for others"
        ) from error
    return {"MPICH": "pmi2", "Open MPI": "pmix"}.get(family(version), "mpirun")  # type: ignore[return-value]


def _write(path: Path, text: str) -> None:
    """Write the script, but do not overwrite one that may have been edited."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{path} exists and is another script: send it as it is (sbatch {path}), remove it, or give an --out"
            )
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
