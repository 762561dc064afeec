"""The ranks of a command: those of its launcher, who all read one configuration, or threads of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import agree, guard, together

if TYPE_CHECKING:
    from mpicomp.exchange.mpi.world import MpiWorld


@contextmanager
def run_world(load: Callable[[], RunConfig], source: object, *, debug: bool) -> Iterator[tuple[MpiWorld, RunConfig]]:
    """Start MPI, and yield the world that the configuration asks for, and the configuration; collective on all ranks.

    An error in the block ends all ranks, see `mpicomp.exchange.guard.guard`. They leave the block together.

    Args:
        load: reads the configuration.
        source: where it is read from, for messages.
        debug: whether to show tracebacks.

    """
    from mpicomp.exchange.mpi.world import MpiWorld  # here, because it starts MPI

    # The world of the run needs a configuration; this one carries the verdict on it.
    everyone = MpiWorld.from_environment("cpu")
    with guard(everyone, debug=debug):
        config = _load_together(everyone, load, source)
        yield MpiWorld.from_environment(config.run.device, config.run.allow_shared_gpu, config.run.node_sums), config
        everyone.barrier()  # a launcher ends the others as soon as one has left with an exit code that is not 0


def _load_together(world: World, load: Callable[[], RunConfig], source: object) -> RunConfig:
    """Load the configuration on every rank; raise an error on all ranks if one fails or reads another configuration."""
    with together(world):
        config = load()
    text = config.to_toml()
    error = None
    if text != world.broadcast(text):
        error = ConfigError(f"{source}: what {world.host} reads there differs from what rank 0 reads")
    agree(world, error)
    return config


def threads(loopback: int | None, simulate: int | None) -> int | None:
    """Return how many ranks are to be threads of this process; None if neither option says so.

    Raises:
        ConfigError: both options are given.

    """
    if loopback is not None and simulate is not None:
        raise ConfigError("--loopback and --simulate both say how many ranks to run: give one of them")
    return loopback or simulate
