"""``mpicomp bench exchange``: messages between neighbors on a ring, compared with plain MPI and with a copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch
from rich.table import Table

from mpicomp.cli import debug_option
from mpicomp.cli.bench.machine import console, json_option, machine, print_machine, seconds, write_json
from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError
from mpicomp.topology import ring

if TYPE_CHECKING:
    from mpicomp.exchange.mpi.world import MpiWorld

SMALLEST = 1000
"""Bytes of the first message; each further one is four times as long."""

_ROUND_S = 0.01
"""The approximate seconds of all calls in one round."""

_WARM_CALLS = 3


@dataclass(frozen=True)
class Row:
    """The figures for one message length; medians over rounds of the slowest rank's mean.

    Attributes:
        nbytes: of each message.
        us: microseconds from `Exchange.start` to the end of `wait`.
        raw_us: of mpi4py's Irecv, Isend and Waitall on the same bytes.
        copy_us: of a copy of the message in memory.
        bytes_per_s: achieved by this package in each direction of each rank.
        raw_bytes_per_s: by mpi4py: the rate of the link, where the message is long.
        ratio: of the two, in the same rounds.

    """

    nbytes: int
    us: float
    raw_us: float
    copy_us: float
    bytes_per_s: float
    raw_bytes_per_s: float
    ratio: float


@click.command()
@click.option(
    "--largest", default=16.0, show_default=True, type=click.FloatRange(0.001), help="Longest message, in MB."
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Medians are over so many.")
@json_option
@debug_option
@click.pass_context
def exchange(ctx: click.Context, largest: float, rounds: int, json_path: Path | None) -> None:
    """Time the exchange with both neighbors on a ring, and mpi4py's Isend and Irecv of the same bytes.

    Start it with mpiexec on two or more ranks. Both are timed in turns; the slowest rank counts. The fixed cost is
    the time of the shortest message, of 1 kB, including that of MPI itself.
    """
    from mpicomp.cli import is_debug
    from mpicomp.exchange.guard import guard
    from mpicomp.exchange.mpi.probe import examine_library  # here, because it starts MPI
    from mpicomp.exchange.mpi.world import MpiWorld

    world = MpiWorld.from_environment("cpu")
    with guard(world, debug=is_debug(ctx)):
        if world.size < 2:
            raise ConfigError("bench exchange needs neighbors: start it as `mpiexec -n 2 mpicomp bench exchange`")
        sizes = [SMALLEST]
        while sizes[-1] * 4 <= largest * 1.03e6:  # 16 MB stands for 16.4
            sizes.append(sizes[-1] * 4)
        rows = [measure(world, nbytes, rounds) for nbytes in sizes]
        hosts = len(set(world.all_gather(world.host)))
        if world.rank == 0:
            facts = machine() | {"mpi": examine_library().version}
            report = {
                "machine": facts,
                "ranks": world.size,
                "hosts": hosts,
                "neighbors": len(ring(world.size).targets(0)),
                "waits": "politely" if world.is_polite else "eagerly",
                "rounds": rounds,
                "fixed_us": rows[0].us,
                "fixed_raw_us": rows[0].raw_us,
                "results": [asdict(row) for row in rows],
            }
            _print(report, rows)
            if json_path:
                write_json(json_path, report)
        world.barrier()


def measure(world: MpiWorld, nbytes: int, rounds: int) -> Row:
    """Return the figures of messages of `nbytes` bytes, a multiple of 4; collective on all ranks."""
    runs = [_packed(world, nbytes), _raw(world, nbytes), _copy(nbytes)]
    for run in runs:
        seconds(run, _WARM_CALLS)  # touches memory, and opens connections
    world.barrier()
    calls = [max(1, int(_ROUND_S / max(world.all_gather(seconds(run, _WARM_CALLS))))) for run in runs]
    taken = []
    for _ in range(rounds):
        row = []
        for run, count in zip(runs, calls, strict=True):
            world.barrier()
            row.append(seconds(run, count))
        taken.append(row)
    slowest = np.max(world.all_gather(taken), axis=0)  # (rounds, runs)
    us, raw_us, copy_us = (1e6 * float(np.median(slowest[:, i])) for i in range(len(runs)))
    sent = 1e6 * nbytes * len(ring(world.size).targets(world.rank))
    ratio = statistics.median(float(raw / own) for own, raw, _ in slowest)
    return Row(nbytes, us, raw_us, copy_us, sent / us, sent / raw_us, ratio)


def _packed(world: MpiWorld, nbytes: int) -> Callable[[], object]:
    """Return a function that does one exchange with this package."""
    graph, entries = ring(world.size), nbytes // 4
    layout = Layout((Field("value", torch.float32, entries),))
    payload = {"value": torch.ones(entries)}
    link = world.exchange(graph)
    return lambda: link.start(payload, layout, graph).wait()


def _raw(world: MpiWorld, nbytes: int) -> Callable[[], object]:
    """Return a function that does the same exchange with mpi4py."""
    from mpicomp.exchange.mpi.library import MPI

    neighbors = ring(world.size).targets(world.rank)
    comm, out = world.comm.Dup(), np.ones(nbytes, np.uint8)
    back = [np.zeros(nbytes, np.uint8) for _ in neighbors]

    def run() -> None:
        requests = [comm.Irecv(buffer, source) for buffer, source in zip(back, neighbors, strict=True)]
        requests += [comm.Isend(out, target) for target in neighbors]
        MPI.Request.Waitall(requests)

    return run


def _copy(nbytes: int) -> Callable[[], object]:
    source, target = torch.ones(nbytes // 4), torch.zeros(nbytes // 4)
    return lambda: target.copy_(source)


def _print(report: dict[str, Any], rows: list[Row]) -> None:
    out = console()
    print_machine(out, report["machine"])
    out.print(
        f"ring of {report['ranks']} ranks on {report['hosts']} hosts, {report['neighbors']} neighbors each, which wait "
        f"{report['waits']}; medians of {report['rounds']}; bytes a second in each direction of a rank"
    )
    table = Table(box=None)
    for column in ("bytes", "us", "mpi4py us", "copy us", "MB/s", "mpi4py MB/s", "of mpi4py's rate"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.nbytes:,}",
            f"{row.us:.1f}",
            f"{row.raw_us:.1f}",
            f"{row.copy_us:.1f}",
            f"{row.bytes_per_s / 1e6:.1f}",
            f"{row.raw_bytes_per_s / 1e6:.1f}",
            f"{row.ratio:.1%}",
        )
    out.print(table)
    out.print(f"fixed cost {report['fixed_us']:.1f} us, of which MPI {report['fixed_raw_us']:.1f} us")
