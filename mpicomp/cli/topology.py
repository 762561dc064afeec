"""``mpicomp topology``: the edges and weights of a graph, and how fast it mixes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from mpicomp.config.toml import parse_value
from mpicomp.errors import ConfigError
from mpicomp.plugins import names
from mpicomp.topology import (
    TOPOLOGIES,
    OnePeerExponential,
    RandomMatching,
    Schedule,
    Topology,
    best_diffusion_step,
    make_topology,
    spectral_gap,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATRIX_RANKS = 12
"""The number of ranks up to which the whole matrix is printed."""

LIST_RANKS = 64
"""How many ranks the list of neighbors shows."""

MATCHINGS = 4
"""How many steps of a schedule without a period are shown."""


@click.command(
    epilog=f"NAME is one of: {', '.join(sorted(names('topology.kind', TOPOLOGIES)))}, or module:attribute.",
    short_help="Show a graph over ranks: neighbors, weights, spectral gap.",
)
@click.argument("name")
@click.option("--ranks", required=True, type=int, help="The number of ranks.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter, e.g. dims=[4,2]; repeatable.")
@click.option("--picture", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the graph into this file.")
def topology(name: str, ranks: int, settings: tuple[str, ...], picture: Path | None) -> None:
    """Show the topology NAME over some ranks: neighbors, weights, checks, spectral gap and best diffusion step."""
    schedule = make_topology(name, ranks, **dict(_parse(setting) for setting in settings))
    console = Console(highlight=False)
    console.print(_properties(schedule))
    for title, graph in _graphs(schedule):
        console.print(_neighbors(graph, title))
    if isinstance(schedule, Topology):
        console.print(_weights(schedule))
    if picture is not None:
        _draw(schedule, picture)
        console.print(f"Picture: {picture}", soft_wrap=True)


def _parse(setting: str) -> tuple[str, Any]:
    """Split ``key=value``."""
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not key or not equals:
        raise ConfigError(f"--set {setting!r} must have the form KEY=VALUE, e.g. --set degree=4")
    return key, parse_value(text)


def _graphs(schedule: Schedule) -> Iterator[tuple[str, Topology]]:
    """Yield the graphs to show, with their titles: one, all of a period, or the first few."""
    if isinstance(schedule, Topology):
        yield "Neighbors", schedule
        return
    steps = schedule.period if isinstance(schedule, OnePeerExponential) else MATCHINGS
    for step in range(steps):
        yield f"Neighbors at step {step}", schedule(step)


def _title(schedule: Schedule) -> str:
    return f"{schedule.name}, {schedule.size} {'rank' if schedule.size == 1 else 'ranks'}"


def _properties(schedule: Schedule) -> Table:
    """Return a table of degree, checks and spectral quantities."""
    table = Table("Property", "Value", title=_title(schedule), title_justify="left")
    for label, value in _facts(schedule):
        table.add_row(label, value)
    return table


def _facts(schedule: Schedule) -> Iterator[tuple[str, str]]:
    graph = schedule(0)
    if graph.dims is not None and graph.periods is not None:
        wraps = "around" if all(graph.periods) else "open"
        yield "Cartesian grid", f"{' x '.join(str(extent) for extent in graph.dims)}, {wraps}"
    at_step = "" if isinstance(schedule, Topology) else " a step"
    fan_out = _range(len(graph.targets(rank)) for rank in range(graph.size))
    yield f"Sources of a rank{at_step}", _range(len(graph.sources(rank)) for rank in range(graph.size))
    yield f"Targets of a rank{at_step}", fan_out
    yield "Bytes a rank sends", f"{fan_out} x those of its message"
    yield "Connected", _yes(schedule.union.is_connected)
    yield "Doubly stochastic", _yes(graph.is_doubly_stochastic)
    yield "Symmetric", _yes(graph.is_symmetric)
    yield from _speed(schedule)


def _speed(schedule: Schedule) -> Iterator[tuple[str, str]]:
    if isinstance(schedule, OnePeerExponential):
        yield "Period", f"{schedule.period} steps"
        yield "Spectral gap of a period", f"{spectral_gap(schedule):.4f}"
    elif isinstance(schedule, RandomMatching):
        yield "Spectral gap of the mean", f"{spectral_gap(schedule.mean):.4f}"
    elif isinstance(schedule, Topology):
        yield "Spectral gap", f"{spectral_gap(schedule):.4f}"
        if schedule.is_symmetric:
            yield "Best diffusion step", f"{best_diffusion_step(schedule):.4f}"


def _neighbors(graph: Topology, title: str) -> Table:
    """Return a table of the sources, with weights, and the targets of every rank."""
    table = Table("Rank", "Own weight", "Hears (weight)", "Sends to", title=title, title_justify="left")
    for rank in range(min(graph.size, LIST_RANKS)):
        heard = [f"{source} ({graph.weight(rank, source):.4g})" for source in graph.sources(rank)]
        told = [str(target) for target in graph.targets(rank)]
        own = f"{graph.weight(rank, rank):.4g}"
        table.add_row(str(rank), own, ", ".join(heard) or "nobody", ", ".join(told) or "nobody")
    if graph.size > LIST_RANKS:
        table.caption = f"and {graph.size - LIST_RANKS} more ranks"
    return table


def _weights(graph: Topology) -> Table:
    """Return a table of the mixing matrix; of the frequency of each weight if the matrix is large."""
    if graph.size > MATRIX_RANKS:
        table = Table("Weight", "Entries", title="Mixing matrix, distinct weights", title_justify="left")
        values, counts = np.unique(graph.matrix.values.round(10), return_counts=True)
        zeros = graph.size**2 - len(graph.matrix.values)
        rows = [(0.0, zeros)] * (zeros > 0) + [*zip(values, counts, strict=True)]
        for value, count in rows[:LIST_RANKS]:
            table.add_row(f"{value:.4g}", str(count))
        return table
    table = Table("", *(str(rank) for rank in range(graph.size)), title="Mixing matrix", title_justify="left")
    for rank, row in enumerate(graph.mixing):
        table.add_row(str(rank), *(f"{weight:.3f}" if weight else "." for weight in row))
    return table


def _range(counts: Iterator[int]) -> str:
    low, *_, high = sorted(counts) * 2
    return str(low) if low == high else f"{low} to {high}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _draw(schedule: Schedule, path: Path) -> None:
    """Draw every edge that may occur; arrows where the graph is directed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib: pip install matplotlib") from error
    inches = min(max(6.0, 0.15 * schedule.size), 30.0)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axes = figure.add_subplot(aspect="equal", title=_title(schedule))
    axes.set_axis_off()
    union = schedule.union
    positions = _positions(union)
    _draw_edges(axes, union, positions)
    axes.scatter(positions[:, 0], positions[:, 1], s=350, color="white", edgecolors="black", zorder=2)
    for rank, (x, y) in enumerate(positions):
        axes.text(x, y, str(rank), ha="center", va="center", fontsize=9, zorder=3)
    axes.margins(0.15)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from error


def _positions(graph: Topology) -> np.ndarray:
    """Return where to draw each rank, (size, 2): on its grid if that is two-dimensional, else on a circle."""
    if _is_flat(graph):
        row, column = np.indices([extent for extent in graph.dims or () if extent > 1]).reshape(2, -1)
        return np.stack([column, -row], axis=1).astype(float)
    angle = math.pi / 2 - 2 * math.pi * np.arange(graph.size) / graph.size
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _is_flat(graph: Topology) -> bool:
    """Return whether the graph is a two-dimensional grid."""
    return sum(extent > 1 for extent in graph.dims or ()) == 2


def _draw_edges(axes: Axes, graph: Topology, positions: np.ndarray) -> None:
    edges = [*zip(graph.matrix.rows.tolist(), graph.matrix.indices.tolist(), strict=True)]
    known = set(edges)
    for target, source in edges:
        both = (source, target) in known
        if source == target or (both and source > target):
            continue
        # On a grid an edge that wraps around would lie on the edges between, so it is bent.
        straight = not _is_flat(graph) or np.abs(positions[target] - positions[source]).sum() < 1.5
        axes.annotate(
            "",
            xy=tuple(positions[target]),
            xytext=tuple(positions[source]),
            arrowprops={
                "arrowstyle": "-" if both else "-|>",
                "connectionstyle": "arc3,rad=0" if straight else "arc3,rad=0.25",
                "color": "gray",
                "shrinkA": 0 if both else 10,
                "shrinkB": 0 if both else 10,
            },
            zorder=1,
        )
