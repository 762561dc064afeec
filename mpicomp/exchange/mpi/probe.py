"""What the MPI at hand is, and whether it works: facts and small trials for ``mpicomp doctor``.

Importing this module starts MPI.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ExchangeError
from mpicomp.exchange.bandwidths import LARGE, SMALL, exchange_seconds
from mpicomp.exchange.base import Mail, all_reduce_nbytes
from mpicomp.exchange.launcher import launched_by
from mpicomp.exchange.mailbox.window import allocate
from mpicomp.exchange.mpi import device_buffers
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.world import MpiWorld
from mpicomp.exchange.node_sums import describe
from mpicomp.topology import ring

_LEVELS = {
    MPI.THREAD_SINGLE: "single",
    MPI.THREAD_FUNNELED: "funneled",
    MPI.THREAD_SERIALIZED: "serialized",
    MPI.THREAD_MULTIPLE: "multiple",
}

WINDOW = 64 * 1024


@dataclass(frozen=True)
class Library:
    """The MPI library of this process.

    Attributes:
        version: its own text, one line.
        standard: the version of the MPI standard that it claims.
        path: the file that is loaded.
        mpi4py: the version of its Python interface.
        thread_level: what it provides.
        launcher: who started this process.
        cuda_support: what it says of memory of CUDA GPUs, by whom was asked; empty where nobody could be. Yes does not
            mean that it works.

    """

    version: str
    standard: str
    path: str
    mpi4py: str
    thread_level: str
    launcher: str
    cuda_support: dict[str, bool]


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and on what.

    Attributes:
        cores: how many it is allowed on.
        core_share: how many fall to it, when each is split between the ranks allowed on it.
        threads: how many torch uses.
        gpu: the name of its GPU, None on the CPU.
        uuid: that of its GPU, or of its part of one.
        capability: what its GPU can, such as 9.0.
        free_gb: 1e9 bytes that are free on its GPU.
        total_gb: all that it has.
        near_cores: how many of the cores that the rank is allowed on are on its GPU's side of the machine; None if that
            is not known.

    """

    rank: int
    host: str
    local_rank: int
    local_size: int
    cores: int
    core_share: float
    threads: int
    gpu: str | None
    uuid: str | None
    capability: str | None = None
    free_gb: float | None = None
    total_gb: float | None = None
    near_cores: int | None = None


@dataclass(frozen=True)
class Trial:
    """How something went that was tried for real, on the slowest rank.

    Attributes:
        problem: what is wrong; empty if the bytes that arrived were the right ones.
        latency_us: microseconds for one small operation.
        mb_per_s: 1e6 bytes a second that a rank has sent in large ones; None if that was not measured.
        how: the way that was chosen, where there are several.

    """

    problem: str
    latency_us: float | None = None
    mb_per_s: float | None = None
    how: str = ""


def examine_library() -> Library:
    """Return the facts about the MPI library; not collective."""
    path = _loaded_library()
    claim = launched_by(os.environ)
    return Library(
        version=" ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split()),
        standard=".".join(map(str, MPI.Get_version())),
        path=str(path or "unknown"),
        mpi4py=version("mpi4py"),
        thread_level=_LEVELS[MPI.Query_thread()],
        launcher=claim[0] if claim else "none",
        cuda_support=device_buffers.ask(ctypes.CDLL(str(path)), os.environ) if path else {},
    )


def examine_place(world: MpiWorld) -> Place:
    """Return where this rank runs; not collective."""
    gpu, cores = world.gpu, os.sched_getaffinity(0)
    free, total = torch.cuda.mem_get_info(gpu.device) if gpu else (None, None)
    return Place(
        rank=world.rank,
        host=world.host,
        local_rank=world.local_rank,
        local_size=world.local_size,
        cores=len(cores),
        core_share=world.core_share,
        threads=torch.get_num_threads(),
        gpu=gpu.name if gpu else None,
        uuid=gpu.uuid if gpu else None,
        capability=".".join(map(str, gpu.capability)) if gpu else None,
        free_gb=None if free is None else round(free / 1e9, 1),
        total_gb=None if total is None else round(total / 1e9, 1),
        near_cores=None if gpu is None or gpu.cores is None else len(gpu.cores & cores),
    )


def try_neighbors(world: MpiWorld) -> Trial:
    """Exchange messages on a ring and compare every byte; collective on all ranks."""
    topology = ring(world.size)
    exchange = world.exchange(topology)

    def once(numel: int, step: int) -> bool:
        layout = Layout((Field("bytes", torch.uint8, numel),))
        payload = {"bytes": _pattern(numel, world.rank + step).to(world.device)}
        received = exchange.start(payload, layout, topology).wait()
        return all(
            torch.equal(message["bytes"].cpu(), _pattern(numel, source + step)) for source, message in received.items()
        )

    outcomes = [once(numel, step) for step, numel in enumerate((1, SMALL, 65_537, LARGE))]
    small, large = (exchange_seconds(world, exchange, topology, *trial) for trial in ((SMALL, 50), (LARGE, 5)))
    reads = world.all_gather([source in exchange.near for source in topology.sources(world.rank)])
    how = "shared memory" if all(map(all, reads)) else "shared memory and MPI" if any(map(any, reads)) else "MPI"
    exchange.free()
    problem = "" if all(outcomes) else "wrong bytes arrived from a neighbor"
    sent = LARGE * len(topology.targets(world.rank))
    return replace(_slowest(world, Trial(problem, small * 1e6, sent / large / 1e6)), how=how if world.size > 1 else "")


def try_window(world: MpiWorld) -> Trial:
    """Put bytes into the right-hand neighbor's window and compare them there; collective on all ranks."""
    comm = world.comm.Dup()
    window = allocate(comm, WINDOW)
    target, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    data = _pattern(WINDOW, world.rank).numpy()

    def put() -> None:
        window.Put(data, target)
        window.Flush(target)

    seconds = _median_seconds(put, 20)
    world.barrier()
    window.Sync()
    is_right = window.tomemory().tobytes() == _pattern(WINDOW, source).numpy().tobytes()
    window.Unlock_all()
    window.Free()
    comm.Free()
    return _slowest(world, Trial("" if is_right else "wrong bytes arrived in the window", seconds * 1e6))


def try_mailbox(world: MpiWorld) -> Trial:
    """Send messages round a ring by the mailbox that these ranks get, and compare every byte; collective on all ranks.

    Between hosts the neighbors look for their mail all the time here, as they do not while they compute.
    """
    topology = ring(world.size)
    mailbox = world.mailbox(topology, LARGE)
    sources, targets = topology.sources(world.rank), topology.targets(world.rank)

    def once(numel: int, step: int) -> bool:
        layout = Layout((Field("bytes", torch.uint8, numel),))
        payload = {"bytes": _pattern(numel, world.rank + step).to(world.device)}
        while not all(mailbox.room(target) for target in targets):
            mailbox.pause()
        mailbox.put(payload, layout, targets, step)
        arrived: dict[int, list[Mail]] = {}
        while len(arrived) < len(sources):
            arrived |= mailbox.receive(layout, up_to=step)
            mailbox.pause()
        return all(
            torch.equal(mails[0].payload["bytes"].cpu(), _pattern(numel, source + step))
            for source, mails in arrived.items()
        )

    steps = itertools.count()
    outcomes = [once(numel, next(steps)) for numel in (1, 65_537, LARGE)]
    seconds = _median_seconds(lambda: outcomes.append(once(SMALL, next(steps))), 20)
    how = mailbox.how
    mailbox.free()
    trial = _slowest(world, Trial("" if all(outcomes) else "wrong bytes arrived in the mailbox", seconds * 1e6))
    return replace(trial, how=how)


def try_sum(world: MpiWorld) -> Trial:
    """Average whole numbers as `Exchange.mean_` does, and compare every one; collective on all ranks."""
    exchange = world.exchange(ring(world.size))

    def is_right(numel: int) -> bool:
        x = _pattern(numel, world.rank).to(world.device, torch.float64)
        exchange.mean_(x)
        everyone = torch.stack([_pattern(numel, rank).double() for rank in range(world.size)])
        return torch.equal(x.cpu(), everyone.sum(0) / world.size)

    outcomes = [is_right(numel) for numel in (1, 65_537, LARGE // 8)]
    small, large = torch.zeros(1, device=world.device), torch.zeros(LARGE // 4, device=world.device)
    small_s, large_s = (_median_seconds(partial(exchange.mean_, x), 10) for x in (small, large))
    exchange.free()
    problem = "" if all(outcomes) else "a mean of whole numbers is wrong"
    trial = Trial(problem, small_s * 1e6, all_reduce_nbytes(large, world.size) / large_s / 1e6)
    return replace(_slowest(world, trial), how=describe(world.node_sums))


def try_device_buffers(world: MpiWorld, timeout_s: float) -> dict[str, str]:
    """Return what comes of handing memory of a GPU to MPI, by use; collective on all ranks.

    One rank of each host tries it, in a program of its own, unless the library says no. Empty where nobody tries.
    """
    outcomes: dict[str, str] = {}
    if world.local_rank == 0 and world.gpu and all(examine_library().cuda_support.values()):
        outcomes = device_buffers.try_uses(*device_buffers.trial_of(world.gpu, os.environ), timeout_s)
    return device_buffers.summarize(world.all_gather(outcomes))


def attempt(world: MpiWorld, trial: Callable[[MpiWorld], Trial]) -> Trial:
    """Return what `trial` returns, or its error; collective on all ranks, and ends them if it fails on some only."""
    try:
        return trial(world)
    except (MPI.Exception, ExchangeError) as error:
        return Trial(str(error))


def _median_seconds(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return median(times)


def _slowest(world: MpiWorld, mine: Trial) -> Trial:
    trials = world.all_gather(mine)
    problems = [f"rank {rank}: {trial.problem}" for rank, trial in enumerate(trials) if trial.problem]
    return Trial(
        "; ".join(problems),
        max(trial.latency_us for trial in trials if trial.latency_us is not None),
        min((trial.mb_per_s for trial in trials if trial.mb_per_s is not None), default=None),
    )


def _pattern(numel: int, seed: int) -> torch.Tensor:
    return ((torch.arange(numel) * 37 + seed * 101) % 251).to(torch.uint8)


def _loaded_library() -> Path | None:
    """Return the file of the MPI library in this process's memory, which `ldconfig` or `which` may not know."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    files = {Path(line.split(maxsplit=5)[5]) for line in lines if "/libmpi" in line}
    return next((file for file in sorted(files) if hasattr(ctypes.CDLL(str(file)), "MPI_Init")), None)
