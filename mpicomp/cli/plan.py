"""``mpicomp plan``: whether compression pays for a model on given links, and which method."""

from __future__ import annotations

import dataclasses
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from mpicomp.cli import debug_option, is_debug, set_option
from mpicomp.cli.bench.machine import console, json_option, machine, print_machine, wait_for, write_json
from mpicomp.cli.run_world import run_world
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, ExchangeError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.launcher import launched_by
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.placement import device_of, only_gpu
from mpicomp.run.plan import DDP, MARGIN, Plan, Prediction, choose, choose_rarer
from mpicomp.run.plan import plan as plan_steps
from mpicomp.run.result import readable_bytes

PAYLOAD = 1448 / 1514
"""The part of a full Ethernet frame that is payload of TCP."""

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_REMEDY = (
    "start it under your launcher, which tries the links between the ranks (mpiexec -n 4 mpicomp plan CONFIG.toml), or "
    "say what they are (--link 100mbit --latency 1ms --ranks 64)"
)


@click.command()
@click.argument("config_path", type=click.Path(path_type=Path), metavar="CONFIG.toml")
@set_option
@click.option("--link", metavar="100mbit|10gbit", help="The bandwidth of each rank's network card, in each direction.")
@click.option("--latency", metavar="200us|1ms", help="Of a message, with --link.  [default: 100us]")
@click.option("--ranks", type=int, metavar="N", help="How many there are to be; default: those of the launcher.")
@json_option
@debug_option
@click.pass_context
def plan(
    ctx: click.Context,
    config_path: Path,
    overrides: tuple[str, ...],
    link: str | None,
    latency: str | None,
    ranks: int | None,
    json_path: Path | None,
) -> None:
    """Predict seconds and bytes of a step of each method for the model of CONFIG.toml, and choose one.

    What a rank computes is measured here. Links are given by --link, or tried between the ranks of mpiexec, which then
    measure at the same time, as they would train. Model, data, batch, optimizer, graph and compressor are those of
    CONFIG.toml.
    """
    if latency is not None and link is None:
        raise ConfigError(f"--latency {latency}: goes with --link, e.g. --link 100mbit")
    load = partial(RunConfig.load, config_path, overrides)
    if link is not None:
        links = parse_links(link, latency or "100us")
        if ranks is None:
            raise ConfigError(f"--link {link}: give the number of ranks, too, e.g. --ranks 64")
        config = load()
        device = device_of(only_gpu(config.run.device))
        found = _measured(config, ranks, links, links, device)
        _report(found, device, config_path, overrides, f"{link}, {latency or '100us'}", links, links, json_path)
        return
    claim = launched_by(os.environ)
    if claim is None or claim[1] < 2:
        raise ConfigError(f"a plan needs links between at least 2 ranks: {_REMEDY}")
    with run_world(load, config_path, debug=is_debug(ctx)) as (world, config):
        links, sums = try_links(world)
        world.barrier()  # all measure at the same time, as they would train
        with together(world):
            own = _measured(config, ranks or world.size, links, sums, world.device)
        found = mean_plan(world, own)
        if world.rank == 0:
            how = f"tried between {world.size} ranks"
            _report(found, world.device, config_path, overrides, how, links, sums, json_path)


def parse_links(link: str, latency: str) -> Links:
    """Return links of so much bandwidth (``100mbit``) and latency (``1ms``).

    Raises:
        ConfigError: a number or a unit that is none.

    """
    bits_per_s = _parsed("--link", link, _BITS, "100mbit, 1gbit")
    if not bits_per_s:
        raise ConfigError(f"--link {link}: must be more than 0")
    return Links(_parsed("--latency", latency, _SECONDS, "200us, 1ms"), PAYLOAD * bits_per_s / 8)


def _parsed(option: str, text: str, units: dict[str, float], examples: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([A-Za-z/]*)", text.strip())
    if match is None:
        raise ConfigError(f"{option} {text}: must be a number with a unit, e.g. {examples}")
    number, unit = match.groups()
    if unit.lower() not in units:
        raise ConfigError(f"{option} {text}: unknown unit {unit!r}; use {', '.join(units)}, e.g. {examples}")
    return float(number) * units[unit.lower()]


def try_links(world: Any) -> tuple[Links, Links]:
    """Return the links of messages between neighbors, and those of all-reduces, tried; collective on all ranks.

    Raises:
        ExchangeError: a trial fails.

    """
    from mpicomp.exchange.mpi import probe

    found = []
    for trial, steps in ((probe.try_neighbors, 1), (probe.try_sum, 2 * (world.size - 1))):
        outcome = probe.attempt(world, trial)
        if outcome.problem:
            raise ExchangeError(f"the links cannot be tried: {outcome.problem}. mpicomp doctor says more")
        assert outcome.latency_us is not None and outcome.mb_per_s is not None
        found.append(Links(outcome.latency_us / 1e6 / steps, outcome.mb_per_s * 1e6))
    return found[0], found[1]


def mean_plan(world: World, own: Plan) -> Plan:
    """Return the mean of the plans of all ranks, the same on all of them; collective on all ranks."""
    seconds = world.all_gather(
        (
            [own.computing.gradient_s, own.computing.copy_s],
            [(prediction.seconds, prediction.computing_s) for prediction in own.predictions],
        )
    )
    measured = [statistics.fmean(values) for values in zip(*(of_rank for of_rank, _ in seconds), strict=True)]
    steps = [
        [statistics.fmean(values) for values in zip(*of_method, strict=True)]
        for of_method in zip(*(of_rank for _, of_rank in seconds), strict=True)
    ]
    return dataclasses.replace(
        own,
        computing=dataclasses.replace(own.computing, gradient_s=measured[0], copy_s=measured[1]),
        predictions=tuple(
            dataclasses.replace(prediction, seconds=step_s, computing_s=computing_s)
            for prediction, (step_s, computing_s) in zip(own.predictions, steps, strict=True)
        ),
    )


def verdict(predictions: Sequence[Prediction]) -> list[str]:
    """Return what to use, in sentences."""
    choice = choose(predictions)
    ddp = next(prediction for prediction in predictions if prediction.name == DDP)
    gain = f"{ddp.seconds / choice.seconds:.3g} times as fast a step as DDP's"
    if choice.name == DDP:
        lines = ["Do not compress here: no step is much faster than that of torch's DistributedDataParallel."]
    elif choice.is_dense:
        lines = [f"Do not compress here: {choice.name} has {gain}, and no compressed step is much faster."]
    else:
        lines = [f"Choice: {choice.name}, {gain}."]
    rarer = choose_rarer(predictions)
    if rarer:
        lines.append(
            f"With an exchange only once in many steps: {rarer.name}, {ddp.seconds / rarer.seconds:.3g} times."
        )
    return [
        *lines,
        f"The choice is the first row within {100 * (MARGIN - 1):.0f} % of the fastest that send in every step; rows "
        "that change training least come first. How much a step learns is another question: docs/which_method.md.",
    ]


def _measured(config: RunConfig, ranks: int, links: Links, sums: Links, device: torch.device) -> Plan:
    def stopwatch() -> float:
        wait_for(device)
        return time.perf_counter()

    return plan_steps(config, ranks, links, sums, device, stopwatch)


def _report(
    found: Plan,
    device: torch.device,
    path: Path,
    overrides: Sequence[str],
    how: str,
    links: Links,
    sums: Links,
    json_path: Path | None,
) -> None:
    """Print table and choice, and write them as JSON if a file is given."""
    facts, computing, out = machine(device), found.computing, console()
    print_machine(out, facts)
    out.print(
        f"{' '.join([str(path), *overrides])}: {computing.parameters:,} parameters; ms: gradient "
        f"{1e3 * computing.gradient_s:.2f}, a copy of the parameters "
        f"{1e3 * computing.copy_s:.2f}",
        soft_wrap=True,
        markup=False,
    )
    out.print(
        f"{found.ranks} ranks; links ({how}): {links.bytes_per_s / 1e6:.4g} MB/s, {1e6 * links.latency_s:.0f} us; "
        f"all-reduce: {sums.bytes_per_s / 1e6:.4g} MB/s",
        soft_wrap=True,
        markup=False,
    )
    table = Table(box=None)
    table.add_column("method", no_wrap=True)
    for column in ("ms a step", "computing", "waiting", "sent a step", "times DDP's speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for prediction in found.predictions:
        ms = (prediction.seconds, prediction.computing_s, prediction.waiting_s)
        table.add_row(
            prediction.name,
            *(f"{1e3 * value:.2f}" for value in ms),
            readable_bytes(prediction.nbytes),
            f"{found.predictions[0].seconds / prediction.seconds:.2f}",
        )
    out.print(table)
    for name, why in found.refused.items():
        out.print(f"{name}: not here. {why}", soft_wrap=True, markup=False)
    lines = verdict(found.predictions)
    for line in lines:
        out.print(line, soft_wrap=True, markup=False)
    if json_path:
        write_json(
            json_path,
            {
                "machine": facts,
                "config": str(path),
                "set": list(overrides),
                "ranks": found.ranks,
                "links": asdict(links),
                "sums": asdict(sums),
                "gradient_s": computing.gradient_s,
                "copy_s": computing.copy_s,
                "predictions": [asdict(prediction) for prediction in found.predictions],
                "refused": found.refused,
                "choice": choose(found.predictions).name,
            },
        )
