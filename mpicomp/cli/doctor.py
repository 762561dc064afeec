"""``mpicomp doctor``: which MPI, launcher, cores and GPUs; small trials of both transports; what is wrong."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from mpicomp.errors import ConfigError, ExchangeError
from mpicomp.slurm import job as slurm

if TYPE_CHECKING:
    from mpicomp.exchange.mpi.probe import Library, Place, Trial

TABLE_RANKS = 32
"""Up to how many ranks are listed one by one."""


@dataclass(frozen=True)
class Report:
    """What the doctor has found, the same on all ranks.

    Attributes:
        problems: what is broken, each with the remedy; empty if training can start.
        advice: what works, but could be better.
        software: versions by name.
        library: the MPI library; None if it could not be started.
        places: where each rank runs.
        dense_sums: what adds up dense vectors: MPI, or another library inside nodes.
        trials: what was tried for real, by name.
        device_buffers: what came of handing memory of a GPU to MPI, by use; empty if that was not tried.
        job: the Slurm job around it; None outside of one.
        srun_speaks: what srun can start ranks with; empty without Slurm.

    """

    problems: list[str]
    advice: list[str] = field(default_factory=list)
    software: dict[str, str] = field(default_factory=dict)
    library: Library | None = None
    places: list[Place] = field(default_factory=list)
    dense_sums: str = ""
    trials: dict[str, Trial] = field(default_factory=dict)
    device_buffers: dict[str, str] = field(default_factory=dict)
    job: slurm.Job | None = None
    srun_speaks: list[str] = field(default_factory=list)


@click.command(short_help="Examine MPI, launcher and GPUs, and say what to do.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds that one stage may take.")
def doctor(as_json: bool, timeout: float) -> None:
    """Examine MPI, launcher, cores and GPUs, and try a neighbor exchange, a one-sided window and the mailbox.

    Run it alone, and as you run training: mpiexec -n 4 mpicomp doctor. The exit code is 0 if nothing is broken.
    """
    with _limited(timeout, "starting MPI"):
        try:
            from mpicomp.exchange.mpi import probe  # starts MPI
            from mpicomp.exchange.mpi.world import MpiWorld
            from mpicomp.exchange.node_sums import describe
        except ExchangeError as error:
            _finish(Report([str(error)]), as_json)
    with _limited(timeout, "setting up the ranks"):
        refused = []
        try:
            world = MpiWorld.from_environment(allow_shared_gpu=True)
        except ConfigError as error:  # on all ranks: a GPU that cannot be used
            refused = [str(error)]
            world = MpiWorld.from_environment("cpu")
        places = world.all_gather(probe.examine_place(world))
    trials = {}
    if world.size > 1:
        with _limited(timeout, "exchanging with neighbors"):
            trials["neighbor exchange"] = probe.attempt(world, probe.try_neighbors)
    with _limited(timeout, "writing to a one-sided window"):
        trials["one-sided window"] = probe.attempt(world, probe.try_window)
    if world.size > 1:
        with _limited(timeout, "sending by mailbox"):
            trials["mailbox"] = probe.attempt(world, probe.try_mailbox)
    if world.node_sums:
        with _limited(timeout, "adding up inside nodes"):
            trials["dense sum"] = probe.attempt(world, probe.try_sum)
    with _limited(timeout, "handing memory of a GPU to MPI"):
        tried = probe.try_device_buffers(world, 0.8 * timeout)
    with _limited(timeout, "asking Slurm"):
        # One rank asks: a controller serves thousands.
        job, srun_speaks = world.broadcast(_ask_slurm() if world.rank == 0 else (None, []))
    with _limited(timeout, "leaving"):
        library = probe.examine_library()
        report = Report(
            problems=refused + find_problems(library, places, trials),
            advice=find_advice(places, trials)
            + find_slurm_advice(library.version, len(places), job, srun_speaks, os.environ),
            software=_versions(),
            library=library,
            places=places,
            dense_sums=describe(world.node_sums),
            trials=trials,
            device_buffers=tried,
            job=job,
            srun_speaks=srun_speaks,
        )
        if world.rank == 0:
            _print(report, as_json)
        world.barrier()
    sys.exit(_exit_code(report))


def find_problems(library: Library, places: list[Place], trials: dict[str, Trial]) -> list[str]:
    """Return what is broken, each with its remedy."""
    from mpicomp.exchange.placement import shared_gpus

    problems = [
        f"the {name} fails: {trial.problem}. {_REMEDIES[name]}" for name, trial in trials.items() if trial.problem
    ]
    for uuid, ranks in shared_gpus([place.uuid for place in places]).items():
        problems.append(
            f"ranks {', '.join(map(str, ranks))} share the GPU {uuid}: start one rank per GPU, let the launcher bind "
            "one to each rank, or train on the CPU; mpicomp train refuses this unless it is allowed"
        )
    if library.thread_level in ("single", "funneled"):
        problems.append(
            f"MPI provides only the thread level {library.thread_level!r}: is MPI4PY_RC_THREAD_LEVEL set? Unset it."
        )
    return problems


def find_advice(places: list[Place], trials: Mapping[str, Trial]) -> list[str]:
    """Return what works, but could be better."""
    advice = []
    how = trials["mailbox"].how if "mailbox" in trials else ""
    if "messages" in how and "thread" not in how:
        advice.append(
            "between these hosts nothing is written into the memory of a rank that computes: messages over 64 KB of "
            "asynchronous methods move while their target pokes its mailbox, between layers or steps. With "
            "MPI4PY_RC_THREAD_LEVEL=multiple a thread does that"
        )
    if len(places) == 1:
        advice.append("one rank only: try the same under your launcher, e.g. mpiexec -n 4 mpicomp doctor")
    if far := [place for place in places if place.near_cores is not None and place.near_cores < place.cores]:
        place = min(far, key=lambda place: place.near_cores or 0)
        advice.append(
            f"{len(far)} rank(s) may run far from their GPU (rank {place.rank} on {place.host}: {place.near_cores} of "
            f"{place.cores} cores are near), and messages then cross from one processor to the other: let the launcher "
            "bind ranks to cores near their GPUs (srun --gpu-bind=closest --cpu-bind=cores, mpiexec's binding to numa)"
        )
    crowded = [place for place in places if place.core_share < 1 - 1e-9]
    if crowded:
        place = crowded[0]
        advice.append(
            f"{place.local_size} ranks on {place.host} share cores (rank {place.rank} gets {place.core_share:.2g} of "
            f"the {place.cores} that it may use): ranks sleep while they wait, which is right for tests. For speed "
            "start fewer ranks, or check the launcher's binding"
        )
    if all(place.gpu is None for place in places) and list(Path("/dev").glob("nvidia[0-9]*")):
        advice.append(
            "there is an NVIDIA GPU that torch cannot use: install a torch built for CUDA, or check the driver"
        )
    return advice


def find_slurm_advice(
    library: str, size: int, job: slurm.Job | None, srun_speaks: list[str], environ: Mapping[str, str]
) -> list[str]:
    """Return what is to be known about Slurm.

    Args:
        library: the MPI library's own text.
        size: how many ranks there are.
        job: the job around them, if there is one.
        srun_speaks: the plugins of ``srun --mpi=list``.
        environ: the environment of rank 0.

    """
    from mpicomp.exchange.launcher import family

    advice = []
    if srun_speaks:
        wanted = {"MPICH": "pmi2", "Open MPI": "pmix"}.get(family(library), "")
        if wanted and any(name == wanted or name.startswith(f"{wanted}_") for name in srun_speaks):
            if job is None:
                advice.append(
                    f"Slurm is here: start ranks of this MPI with srun --mpi={wanted} (see mpicomp slurm script)"
                )
        else:
            advice.append(
                f"srun speaks {', '.join(srun_speaks)}, which this MPI may not understand: start its own mpirun inside "
                "the job (mpicomp slurm script --mpi mpirun)"
            )
    if job is None:
        return advice
    if job.tasks is not None and job.tasks != size and "SLURM_STEP_ID" not in environ:
        advice.append(
            f"job {job.number} was made for {job.tasks} tasks, but {size} rank(s) run: start all of them with srun or "
            'mpirun -n "$SLURM_NTASKS"'
        )
    if job.is_requeued is False:
        advice.append(f"job {job.number} will not be queued again when it is stopped: send it with --requeue")
    if job.end_time is None:
        advice.append(
            f"job {job.number} does not tell its time limit: if it has one, give it to mpicomp train as --time-limit"
        )
    if environ.get("SLURM_CPUS_PER_TASK") and "SLURM_STEP_ID" not in environ and "SRUN_CPUS_PER_TASK" not in environ:
        advice.append(
            "srun does not inherit --cpus-per-task from Slurm 22.05 on: export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
        )
    return advice


def _ask_slurm() -> tuple[slurm.Job | None, list[str]]:
    return slurm.current_job(os.environ), slurm.srun_speaks()


_REMEDIES = {
    "neighbor exchange": (
        "Try the MPI's own test programs; in containers CMA may be forbidden (Open MPI: OMPI_MCA_smsc=^cma); between "
        "hosts check the firewall and which network interface is taken"
    ),
    "one-sided window": (
        "Training with neighbor exchanges still works; with Open MPI try another component for windows "
        "(OMPI_MCA_osc=rdma)"
    ),
    "mailbox": "Training with neighbor exchanges still works; asynchronous methods do not",
    "dense sum": "Leave the sums of ssgd to MPI: run.node_sums=mpi, in a script node_sums='mpi'",
}


def _versions() -> dict[str, str]:
    import h5py
    import torch

    from mpicomp import kernels

    return {
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "HDF5": f"{h5py.version.hdf5_version}, h5py {h5py.__version__}, MPI {'yes' if h5py.get_config().mpi else 'no'}",
        "compression": "compiled kernels (numba)"
        if kernels.compiled()
        else "plain torch, several times slower on the CPU: pip install numba",
    }


def _finish(report: Report, as_json: bool) -> NoReturn:
    _print(report, as_json)
    sys.exit(_exit_code(report))


def _exit_code(report: Report) -> int:
    return ExchangeError.exit_code if report.problems else 0


def _print(report: Report, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    if report.library:
        console.print(_facts(report, report.library))
    if report.places:
        console.print(_ranks(report.places))
    if report.trials:
        console.print(_trials(report.trials))
    for line in report.advice:
        console.print(f"advice: {line}", markup=False)
    for line in report.problems:
        console.print(f"problem: {line}", markup=False, style="bold red")
    if not report.problems:
        console.print("nothing is broken")


def _facts(report: Report, library: Library) -> Table:
    places = report.places
    table = Table(show_header=False, box=None)
    rows: dict[str, Any] = {
        "MPI": f"{library.version}, standard {library.standard}",
        "library": library.path,
        "mpi4py": library.mpi4py,
        "launcher": library.launcher,
        "threads": library.thread_level,
        "CUDA-aware": ", ".join(f"{who} {'yes' if yes else 'no'}" for who, yes in library.cuda_support.items())
        or "cannot be asked",
        "GPU buffers": f"{_tried(report, library)}; messages pass through host memory in any case",
        "dense sums": report.dense_sums or None,
        "ranks": f"{len(places)} on {len({place.host for place in places})} host(s)",
        "Slurm": _job(report.job) if report.job else None,
        "srun speaks": ", ".join(report.srun_speaks) or None,
        "crowded": "yes" if any(place.core_share < 1 - 1e-9 for place in places) else "no",
        "GPUs": len({place.uuid for place in places if place.uuid}) or "none: running on the CPU",
        **report.software,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def _tried(report: Report, library: Library) -> str:
    if report.device_buffers:
        return ", ".join(f"{use} {outcome}" for use, outcome in report.device_buffers.items())
    return "not tried: no GPU" if all(library.cuda_support.values()) else "not tried: the library says no"


def _job(job: slurm.Job) -> str:
    left = "no end known" if job.end_time is None else f"{max(job.end_time - time.time(), 0) / 60:.0f} min left"
    return (
        f"job {job.number} ({job.name}), {job.tasks or '?'} task(s) on {job.nodes} node(s), {left}, "
        f"requeued {job.restarts} time(s)"
    )


def _ranks(places: list[Place]) -> Table:
    columns = ("capability", "free", "near cores") if any(place.uuid for place in places) else ()
    table = Table("rank", "host", "local rank", "cores", "share", "threads", "GPU", "UUID", *columns)
    for place in places[:TABLE_RANKS]:
        cells = (place.rank, place.host, f"{place.local_rank} of {place.local_size}", place.cores)
        more = (f"{place.core_share:.2f}", place.threads, place.gpu or "-", place.uuid or "-")
        gpu = (place.capability or "-", f"{place.free_gb} of {place.total_gb} GB" if place.uuid else "-")
        near = "unknown" if place.near_cores is None else f"{place.near_cores} of {place.cores}"
        table.add_row(*map(str, cells + more + ((*gpu, near) if columns else ())))
    if len(places) > TABLE_RANKS:
        table.add_row("...", f"{len(places) - TABLE_RANKS} more")
    return table


def _trials(trials: dict[str, Trial]) -> Table:
    table = Table("tried", "result", "latency", "bandwidth")
    for name, trial in trials.items():
        table.add_row(
            f"{name}: {trial.how}" if trial.how else name,
            trial.problem or "right",
            f"{trial.latency_us:.0f} us" if trial.latency_us is not None else "-",
            f"{trial.mb_per_s:.0f} MB/s" if trial.mb_per_s is not None else "-",
        )
    return table


@contextmanager
def _limited(timeout_s: float, stage: str) -> Iterator[None]:
    """End the process, naming the stage, if the block takes longer: the doctor must not hang.

    `mpicomp.exchange.watchdog` looks whether ranks move; here MPI may not have started.
    """

    def give_up() -> None:
        sys.stderr.write(
            f"mpicomp doctor: stuck for {timeout_s:g} s while {stage}: "
            "do all ranks run, and do they reach each other?\n"
        )
        sys.stderr.flush()
        os._exit(ExchangeError.exit_code)

    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
