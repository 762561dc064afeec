"""``mpicomp bench step``: the seconds of a training step by part, compared with the step without communication."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from mpicomp.algorithms import AsynchronousAlgorithm
from mpicomp.cli import debug_option, is_debug, set_option
from mpicomp.cli.bench.machine import console, json_option, machine, print_machine, wait_for, write_json
from mpicomp.cli.run_world import run_world
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import guard, together
from mpicomp.exchange.placement import device_of, only_gpu
from mpicomp.replica.distributed import Distributed
from mpicomp.replica.flat import FlatModel
from mpicomp.replica.record import PARTS
from mpicomp.replica.state import seed_random
from mpicomp.run.result import readable_bytes
from mpicomp.run.setup import Setup, set_up, with_bandwidths

_WARM_BLOCKS = 1


@dataclass(frozen=True)
class Steps:
    """The cost of a step: medians over blocks of steps of the mean over ranks.

    Attributes:
        ranks: the number of ranks.
        steps_a_block: the steps in each block.
        seconds: of a step.
        parts: the seconds by part: gradient, compress, exchange, mix.
        alone_seconds: of the same step without communication, on all ranks at the same time.
        ratio: of `seconds` to `alone_seconds`.
        nbytes: bytes sent by a rank in a step.
        cpu_seconds: of the thread of a rank in a step.

    """

    ranks: int
    steps_a_block: int
    seconds: float
    parts: dict[str, float]
    alone_seconds: float
    ratio: float
    nbytes: float
    cpu_seconds: float


@click.command()
@click.argument("config_path", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@set_option
@click.option("--blocks", default=10, show_default=True, type=click.IntRange(1), help="Medians are over so many.")
@click.option(
    "--block",
    "length",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Steps in each of them; rounded up to whole periods of the method and its graphs.",
)
@click.option(
    "--loopback",
    "sizes",
    multiple=True,
    type=click.IntRange(1),
    metavar="N",
    help="Run N ranks as threads; repeatable.",
)
@json_option
@debug_option
@click.pass_context
def step(
    ctx: click.Context,
    config_path: Path,
    overrides: tuple[str, ...],
    blocks: int,
    length: int,
    sizes: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Time the training step of CONFIG.toml by part, in turns with the same step without communication.

    Start it with mpiexec, or with --loopback N; several --loopback show what a rank costs as ranks are added: CPU time
    and bytes, which stay the same where a rank talks to its neighbors alone. Blocks of steps take turns. On a GPU
    (run.device) a block ends when the GPU has done it; the parts are times of the host.
    """
    load = partial(RunConfig.load, config_path, overrides)
    if sizes:
        from mpicomp.exchange.loopback import run

        config = load()
        device = device_of(only_gpu(config.run.device))
        timed = partial(_set_up_and_measure_guarded, config=config, blocks=blocks, length=length, debug=is_debug(ctx))
        results = [run(size, timed, device=device)[0] for size in sizes]
        report = _report(device, config_path, overrides, blocks, "loopback", results)
        _print(report, results)
        if json_path:
            write_json(json_path, report)
        return
    with run_world(load, config_path, debug=is_debug(ctx)) as (world, config):
        result = _set_up_and_measure(world, config, blocks, length)
        if world.rank == 0:
            report = _report(world.device, config_path, overrides, blocks, "MPI", [result])
            _print(report, [result])
            if json_path:
                write_json(json_path, report)


def _set_up_and_measure_guarded(world: World, config: RunConfig, blocks: int, length: int, debug: bool) -> Steps:
    with guard(world, debug=debug):
        return _set_up_and_measure(world, config, blocks, length)


def _set_up_and_measure(world: World, config: RunConfig, blocks: int, length: int) -> Steps:
    groups = config.topology.groups(world)
    config = with_bandwidths(config, world, groups)
    with together(world):
        setup = set_up(config, world, groups)
        if isinstance(setup.algorithm, AsynchronousAlgorithm):
            raise ConfigError(
                f"algorithm.kind = {config.algorithm.kind!r}: its ranks have no common steps; bench step times "
                "synchronous algorithms"
            )
    return measure(world, config, setup, blocks, length)


def measure(world: World, config: RunConfig, setup: Setup, blocks: int, length: int) -> Steps:
    """Measure blocks of at least `length` steps of `setup`; collective on all ranks."""
    assert not isinstance(setup.algorithm, AsynchronousAlgorithm)
    # A block of whole periods: in others, a method that sends in every 50th step mostly sends nothing.
    period = getattr(setup.algorithm, "period", 1) * getattr(setup.schedule, "period", 1)
    length = -(-length // period) * period
    node = world.node(setup.groups) if setup.groups else None
    gossip = Distributed(setup.model, setup.optimizer, setup.algorithm, setup.schedule, world, node)
    gossip.local.delay = config.gradient_delay(world)
    alone = _Alone(setup, config)
    seed_random(config.run.seed, world.rank)
    rows = []
    for block in range(_WARM_BLOCKS + blocks):
        steps = range(block * length, (block + 1) * length)
        batches = [setup.batch(step % setup.steps, world.rank, world.device) for step in steps]
        sent = gossip.bytes_sent
        gossip.meter.skip()  # what the other model has done
        row = _timed(world, [partial(gossip.step, partial(setup.loss, *batch)) for batch in batches])
        _, parts = gossip.meter.take()
        row |= {part: parts[part] / length for part in PARTS if part != "mix"}
        row["mix"] = row["seconds"] - sum(row[part] for part in PARTS if part != "mix")
        row["nbytes"] = (gossip.bytes_sent - sent) / length
        row["alone"] = _timed(world, [partial(alone.step, *batch) for batch in batches])["seconds"]
        rows.append(row)
    everyone = world.all_gather(rows[_WARM_BLOCKS:])
    means = [
        {key: statistics.fmean(row[key] for row in of_block) for key in of_block[0]}
        for of_block in zip(*everyone, strict=True)
    ]
    medians = {key: statistics.median(row[key] for row in means) for key in means[0]}
    return Steps(
        ranks=world.size,
        steps_a_block=length,
        seconds=medians["seconds"],
        parts={part: medians[part] for part in PARTS},
        alone_seconds=medians["alone"],
        ratio=statistics.median(row["seconds"] / row["alone"] for row in means),
        nbytes=medians["nbytes"],
        cpu_seconds=medians["cpu"],
    )


class _Alone:
    """A second model of the same configuration, trained without communication."""

    def __init__(self, setup: Setup, config: RunConfig) -> None:
        model = config.model.build(setup.dataset, config.run.seed).to(next(setup.model.parameters()).device)
        self._setup = dataclasses.replace(setup, model=model, optimizer=config.optimizer.build(model))
        self._local = FlatModel(model, self._setup.optimizer)

    def step(self, *batch: Any) -> None:
        self._local.closure = partial(self._setup.loss, *batch)
        local = self._local
        local.gradient()
        local.update()


def _timed(world: World, steps: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Return the mean seconds of `steps`, started on all ranks at the same time: wall-clock, and of this thread."""
    wait_for(world.device)
    world.barrier()
    cpu, start = time.thread_time(), time.perf_counter()
    for run in steps:
        run()
    wait_for(world.device)
    seconds, cpu = time.perf_counter() - start, time.thread_time() - cpu
    return {"seconds": seconds / len(steps), "cpu": cpu / len(steps)}


def _report(
    device: torch.device,
    path: Path,
    overrides: Sequence[str],
    blocks: int,
    ranks_are: str,
    results: Sequence[Steps],
) -> dict[str, Any]:
    return {
        "machine": machine(device),
        "config": str(path),
        "set": list(overrides),
        "ranks_are": ranks_are,
        "threads_a_rank": os.environ.get("OMP_NUM_THREADS"),
        "blocks": blocks,
        "results": [asdict(result) for result in results],
    }


def _print(report: dict[str, Any], results: Sequence[Steps]) -> None:
    out = console()
    print_machine(out, report["machine"])
    lengths = " or ".join(str(length) for length in dict.fromkeys(result.steps_a_block for result in results))
    out.print(
        f"{report['config']} {' '.join(report['set'])}: ranks by {report['ranks_are']}, medians of "
        f"{report['blocks']} blocks of {lengths} steps; ms a step",
        soft_wrap=True,
        markup=False,
    )
    table = Table(box=None)
    for column in ("ranks", "ms", *PARTS, "alone", "ratio", "CPU ms a rank", "bytes a rank"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        ms = [result.seconds, *result.parts.values(), result.alone_seconds]
        table.add_row(
            str(result.ranks),
            *(f"{1e3 * value:.2f}" for value in ms),
            f"{result.ratio:.3f}",
            f"{1e3 * result.cpu_seconds:.2f}",
            readable_bytes(result.nbytes),
        )
    out.print(table)
