"""How dense sums travel inside a node: what was asked for, what the ranks have, and what they agree on. No MPI.

MPI adds up between nodes in any case. Inside a node `torch.distributed` may do it first, over NCCL between GPUs or over
gloo on the CPU (`mpicomp.exchange.mpi.node_group`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch.distributed

from mpicomp.errors import ConfigError
from mpicomp.exchange.base import World
from mpicomp.exchange.guard import together
from mpicomp.exchange.placement import shared_gpus

Backend = Literal["nccl", "gloo"]
"""What adds up inside a node, other than MPI."""

NodeSums = Literal["auto", "mpi", "nccl", "gloo"]
"""What a user may ask for; ``"auto"`` is NCCL where every rank has a GPU of its own and a node has several ranks."""

_OR_MPI = "or leave the sums to MPI (run.node_sums=mpi, in a script node_sums='mpi')"


@dataclass(frozen=True)
class Facts:
    """What a rank asks for, and what it has.

    Attributes:
        wish: as the user has set it.
        uuid: of its GPU; None on the CPU.
        local_size: how many ranks its node has.
        backends: those that its torch has.

    """

    wish: NodeSums
    uuid: str | None
    local_size: int
    backends: frozenset[str]


def agree_on_node_sums(world: World, wish: NodeSums, uuid: str | None) -> Backend | None:
    """Return what adds up inside nodes, the same on all ranks; None for MPI alone. Collective on all ranks.

    Args:
        world: the ranks.
        wish: what the user asks for.
        uuid: of the GPU of this rank; None on the CPU.

    Raises:
        ConfigError: on every rank; see `choose`.

    """
    everywhere = world.all_gather(Facts(wish, uuid, world.local_size, backends()))
    with together(world):
        return choose(everywhere)


def backends() -> frozenset[str]:
    """Return the backends that this torch was built with."""
    if not torch.distributed.is_available():
        return frozenset()
    has = {"nccl": torch.distributed.is_nccl_available(), "gloo": torch.distributed.is_gloo_available()}
    return frozenset(name for name, is_there in has.items() if is_there)


def choose(everywhere: Sequence[Facts]) -> Backend | None:
    """Return what adds up inside nodes, given the facts of all ranks; None for MPI alone.

    Raises:
        ConfigError: ranks ask for different things, or for what they cannot have.

    """
    wishes = [facts.wish for facts in everywhere]
    if different := [rank for rank, wish in enumerate(wishes) if wish != wishes[0]]:
        raise ConfigError(
            f"node_sums = {wishes[different[0]]!r} on rank {different[0]}, and {wishes[0]!r} on rank 0: give all ranks "
            "the same"
        )
    wish = wishes[0]
    if wish not in get_args(NodeSums):
        raise ConfigError(f"node_sums = {wish!r} must be one of {', '.join(map(repr, get_args(NodeSums)))}")
    if wish == "mpi":
        return None
    backend: Backend = "gloo" if wish == "gloo" else "nccl"
    obstacle = _obstacle(backend, everywhere)
    if obstacle and wish != "auto":
        raise ConfigError(f"node_sums = {wish!r}: {obstacle}, {_OR_MPI}")
    has_mates = any(facts.local_size > 1 for facts in everywhere)
    return backend if has_mates and not obstacle else None


def describe(backend: Backend | None) -> str:
    """Return how dense sums travel, for reports."""
    return "MPI" if backend is None else f"{_NAMES[backend]} inside nodes, MPI between them"


_NAMES = {"nccl": "NCCL", "gloo": "gloo"}


def _obstacle(backend: Backend, everywhere: Sequence[Facts]) -> str:
    """Return why the ranks cannot use `backend`, and what to do; empty if they can."""
    if lacking := [rank for rank, facts in enumerate(everywhere) if backend not in facts.backends]:
        return f"torch has no {_NAMES[backend]} on {_ranks(lacking)}: install a build that has it"
    uuids = [facts.uuid for facts in everywhere]
    if backend == "gloo":
        on_gpu = [rank for rank, uuid in enumerate(uuids) if uuid is not None]
        return f"gloo is for the CPU, and {_ranks(on_gpu)} on a GPU: take 'nccl'" if on_gpu else ""
    if without := [rank for rank, uuid in enumerate(uuids) if uuid is None]:
        return f"NCCL needs a GPU on each rank, and there is none on {_ranks(without)}: start one rank per GPU"
    if shared := shared_gpus(uuids):
        uuid, ranks = next(iter(shared.items()))
        return f"NCCL needs a GPU for each rank, and {_ranks(ranks)} share {uuid}: start one rank per GPU"
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
