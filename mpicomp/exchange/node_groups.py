"""Which ranks form a node that holds one model (see `mpicomp.exchange.base.Node`). No MPI here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mpicomp.errors import ConfigError
from mpicomp.exchange.base import Groups, World


def groups_by_host(world: World) -> Groups:
    """Return the ranks of each machine, in the order of their first ranks; collective on all ranks.

    Raises:
        ConfigError: machines have different numbers of ranks.

    """
    return checked_groups(nodes_of(world, 0), world.size)


def nodes_of(world: World, node_size: int) -> Groups:
    """Return the ranks of each node, which need not be equally many; collective on all ranks.

    A node is the ranks of a host, or `node_size` consecutive ranks if that is not 0.
    """
    return consecutive(world.size, node_size) if node_size else groups_of(world.all_gather(world.host))


def consecutive(size: int, node_size: int) -> Groups:
    """Return nodes of `node_size` consecutive ranks; the last one has those that are left."""
    return tuple(tuple(range(first, min(first + node_size, size))) for first in range(0, size, node_size))


def groups_of(hosts: Sequence[str]) -> Groups:
    """Return the ranks of each host, given the host of each rank."""
    return tuple(tuple(rank for rank, other in enumerate(hosts) if other == host) for host in dict.fromkeys(hosts))


def groups_of_size(size: int, node_size: int) -> Groups:
    """Return nodes of `node_size` consecutive ranks.

    Raises:
        ConfigError: `size` is no multiple of it.

    """
    if node_size < 1 or size % node_size:
        raise ConfigError(
            f"topology.node_size = {node_size} must divide the {size} ranks: every node has as many. Start a multiple "
            "of it, or leave topology.node_size out, and the ranks of a host are a node"
        )
    return checked_groups(consecutive(size, node_size), size)


def checked_groups(groups: Sequence[Sequence[int]], size: int) -> Groups:
    """Return `groups`, each in ascending order, if they divide `size` ranks into nodes of equal size.

    Raises:
        ConfigError: a rank is in no group or in two, or groups have different sizes; names it.

    """
    found = Counter(rank for group in groups for rank in group)
    if unknown := sorted(rank for rank in found if rank not in range(size)):
        raise ConfigError(f"groups name rank {unknown[0]}, and there are ranks 0 to {size - 1}")
    if twice := sorted(rank for rank, count in found.items() if count > 1):
        raise ConfigError(f"rank {twice[0]} is in two groups: each rank belongs to one node")
    if missing := [rank for rank in range(size) if rank not in found]:
        raise ConfigError(f"rank {missing[0]} is in no group: each rank belongs to one node")
    if different := [group for group in groups if len(group) != len(groups[0])]:
        raise ConfigError(
            f"ranks {', '.join(map(str, different[0]))} form a node of {len(different[0])}, and others one of "
            f"{len(groups[0])}: nodes must have as many ranks each. Start as many on each host, or set "
            "topology.node_size (in a script, groups)"
        )
    if len(groups) == 1:
        raise ConfigError(
            f"all {size} ranks are one node, which has nobody to exchange messages with: set topology.level = 'rank' "
            "(in a script, leave out groups), or topology.node_size where several nodes are on one host"
        )
    return tuple(tuple(sorted(group)) for group in groups)
