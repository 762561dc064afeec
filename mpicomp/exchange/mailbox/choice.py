"""Which transport a mailbox gets. A short trial on the ranks of the run decides.

========================================  ===========================================================
a put arrives while its target is busy    the transport of the mailbox
========================================  ===========================================================
on a machine and between machines         a window for all (one machine; or hardware that writes remotely)
on a machine only                         a window on each machine, messages between them
nowhere                                   messages for all
========================================  ===========================================================

The table shows how many ms pass until a message lies in its target's memory, for 22 KB and 1.1 MB. The target computes
for 200 ms, and the message is put 20 ms after it began (``scripts/bench_mailbox --progress``, medians of 5; 2 ranks on
2 cores that other programs used too, so differences of a few ms mean nothing; hosts: `link_lab` at 1 Gbit/s, which
needs 8.7 ms for 1.1 MB).

========================================  =============  =============  =============  =============
transport                                 MPICH, local   Open MPI       MPICH, hosts   Open MPI
========================================  =============  =============  =============  =============
window                                    1.9, 6.6       1.2, 3.6       refused        refused
raw Put and Flush, which block the sender 2.9, 2.2       17, 16         180, 180       180, 181
messages                                  181, 183       182, 183       181, 188       181, 190
messages, poked every 2 ms                2.7, 6.1       8.0, 12        7.3, 20        5.1, 14
messages, progress thread                 2.9, 5.1       2.9, 4.7       10, 22         3.4, 13
========================================  =============  =============  =============  =============

A put returns within 2.5 ms in all cells except those of the raw Put. A message that did not move during the computation
arrives soon after the target polls: within 2 ms for 22 KB and 10 ms for 1.1 MB. So pokes and progress threads help only
if ranks read in the middle of a computation, or if a link needs long for a message.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from mpicomp.errors import ConfigError
from mpicomp.exchange.base import check_schedule
from mpicomp.exchange.mailbox.messages import MessageTransport
from mpicomp.exchange.mailbox.progress import ProgressThread, check_thread_level, is_possible
from mpicomp.exchange.mailbox.slots import SlotMailbox, SlotTransport, slots_of
from mpicomp.exchange.mailbox.window import WindowTransport, is_passive
from mpicomp.exchange.mpi.communicator import Communicator
from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.process import Process
from mpicomp.topology.base import Topology

Transport = Literal["auto", "window", "messages"]
Progress = Literal["auto", "poke", "thread"]


@dataclass(frozen=True)
class Reach:
    """Whether puts arrive while their target makes no MPI call.

    Attributes:
        near: whether they do between ranks of one machine.
        far: whether they do between machines; None if there is only one machine.

    """

    near: bool
    far: bool | None

    @property
    def is_everywhere(self) -> bool:
        """Whether puts arrive without help of the target between all ranks."""
        return self.near and self.far is not False


def try_reach(world: Communicator) -> Reach:
    """Try where puts arrive by themselves (collective on all ranks; up to a second, where they do not)."""
    node = _node(world)
    near = is_passive(node)
    peers = MPI.Intracomm(world.comm.Split(node.rank, key=world.rank))  # one rank of each machine
    far = is_passive(peers) if peers.size > 1 else None
    peers.Free()
    node.Free()
    verdicts = world.all_gather((near, far))
    between = [far for _, far in verdicts if far is not None]
    return Reach(all(near for near, _ in verdicts), all(between) if between else None)


def make_mailbox(
    world: Communicator,
    topology: Topology,
    nbytes: int,
    depth: int,
    device: torch.device,
    reach: Reach,
    transport: Transport = "auto",
    progress: Progress = "auto",
) -> SlotMailbox:
    """Return the mailbox over the edges of `topology` (collective on all ranks).

    Only measurements and tests choose how the bytes travel (`transport`), and whether a thread makes progress
    (`progress`); "auto" takes what `reach` and MPI allow.

    Raises:
        TopologyError: `topology` is made for another number of ranks.
        ConfigError: `transport` is "window" but puts wait for their target, or MPI does not support a progress thread.

    """
    check_schedule(topology, world.size)
    slots_at = partial(slots_of, topology, nbytes=nbytes, depth=depth)
    if transport == "window" and not reach.is_everywhere:
        raise ConfigError(
            "transport = 'window' needs puts that arrive while their target computes, and on these hosts they do not: "
            "take 'auto' or 'messages'"
        )
    if progress == "thread":
        check_thread_level()
    chosen: SlotTransport
    if transport != "messages" and reach.is_everywhere:
        everyone = {rank: rank for rank in range(world.size)}
        chosen = WindowTransport(world.comm.Dup(), everyone, world.rank, slots_at, world.is_polite, world.wait)
    else:
        near = None
        if transport == "auto" and reach.near:
            node = _node(world)
            places = {rank: place for place, rank in enumerate(node.allgather(world.rank))}
            near = WindowTransport(node, places, world.rank, slots_at, world.is_polite, world.wait)
        chosen = MessageTransport(world.comm.Dup(), slots_at, near, world.is_polite)
    mailbox = SlotMailbox(world.rank, device, chosen, topology, nbytes, depth, visible_processes(world))
    if progress == "thread" or (progress == "auto" and isinstance(chosen, MessageTransport) and is_possible()):
        mailbox.progress = ProgressThread(mailbox)
    return mailbox


def visible_processes(world: Communicator) -> dict[int, Process]:
    """Return the processes that this rank can see, by rank (collective on all ranks).

    In containers, processes of one machine may be invisible to each other.
    """
    processes = world.all_gather((world.host, Process.own()))
    return {
        rank: process for rank, (host, process) in enumerate(processes) if host == world.host and process.is_alive()
    }


def _node(world: Communicator) -> MPI.Intracomm:
    """Return a communicator of the ranks of this machine (collective on all ranks)."""
    return MPI.Intracomm(world.comm.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank))
