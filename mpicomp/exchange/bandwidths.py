"""The bandwidth of each rank's link, measured by a short trial: how fast its messages reach its neighbors."""

from __future__ import annotations

from statistics import median

import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Exchange, World
from mpicomp.timing import take_seconds
from mpicomp.topology.base import Schedule, Topology

SMALL = 1024
LARGE = 4 * 2**20
"""Bytes that a rank sends in a round of a trial."""

_ROUNDS = 7


def exchange_seconds(world: World, exchange: Exchange, topology: Topology, nbytes: int, repeats: int) -> float:
    """Return the median seconds on this rank of `repeats` exchanges of `nbytes` bytes in `topology`; collective.

    The ranks begin the first one together. In later ones a rank may wait for neighbors that are behind.
    """
    layout = Layout((Field("bytes", torch.uint8, nbytes),))
    payload = {"bytes": torch.zeros(nbytes, dtype=torch.uint8, device=world.device)}
    world.barrier()
    times = []
    for _ in range(repeats):
        begin = world.now()
        exchange.start(payload, layout, topology).wait()
        times.append(world.now() - begin)
    return median(times)


def measure_bandwidths(world: World, schedule: Schedule) -> list[float]:
    """Measure and return the bandwidth of each rank in bytes a second, the same list on all ranks; collective.

    All ranks exchange messages with all of their neighbors at the same time, as in training, in several rounds that
    they begin together:

        B_k = (large - small) / (least seconds of a large message - least seconds of a small one)

    So B_k is the rate at which one message of rank k reaches the slowest of its neighbors, while they all send. The
    large message grows, to 16 times at most, until it takes clearly longer: within a machine, a rank that shares its
    core may wait longer for that than for megabytes. Three digits are kept. In simulated time, the links are those of
    the simulation.

    Args:
        world: the ranks.
        schedule: the graph of each step; all edges that may occur are tried together.

    Raises:
        ConfigError: the graph is directed, and a rank does not see when its message arrives; or a rank has no
            neighbors, or a link without limit.

    """
    graph = schedule.union
    if any(graph.sources(each) != graph.targets(each) for each in range(graph.size)):
        raise ConfigError(
            f"the bandwidths of a directed graph ({schedule.name}) cannot be measured: give compression.bandwidths"
        )
    first = max(64 * SMALL, LARGE // max(1, *(len(graph.targets(each)) for each in range(graph.size))))
    exchange = world.exchange(graph)
    for large in (first, 4 * first, 16 * first):
        exchange_seconds(world, exchange, graph, large, 1)  # touches memory, and opens connections
        small_s, large_s = (
            min(exchange_seconds(world, exchange, graph, each, 1) for _ in range(_ROUNDS)) for each in (SMALL, large)
        )
        is_clear = world.is_simulated or large_s > 2 * small_s or not graph.sources(world.rank)
        if all(world.all_gather(is_clear)):
            break
    take_seconds()  # no part of a step
    measurable = graph.sources(world.rank) and large_s > small_s  # without neighbors, the seconds are noise
    found = world.all_gather((large - SMALL) / (large_s - small_s) if measurable else None)
    bandwidths = [float(f"{each:.3g}") for each in found if each is not None]
    if len(bandwidths) < world.size:
        raise ConfigError(
            f"the bandwidth of rank {found.index(None)} cannot be measured: it has no neighbors, or its link no limit. "
            "Give compression.bandwidths (in simulated time, simulation.bytes_per_s)"
        )
    return bandwidths
