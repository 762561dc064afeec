"""The mailbox over MPI: the table of the contract, on every transport, and what only MPI has.

The stress test is the short form of ``scripts/stress_mailbox``.
"""

import time
from functools import partial

import numpy as np
import pytest
import torch
from support.mailbox_stress import stress
from support.mailbox_table import LAYOUT, TABLE, exchange_all, patiently

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ConfigError
from mpicomp.exchange.mailbox.choice import Reach, make_mailbox
from mpicomp.exchange.mailbox.progress import is_possible
from mpicomp.exchange.mpi.library import MPI
from mpicomp.topology import ring

pytestmark = pytest.mark.skipif(MPI.COMM_WORLD.size not in (2, 3), reason="the mailbox is tested on 2 and 3 ranks")


def skip_unless_passive(world):
    if not world.reach().is_everywhere:
        pytest.skip("between these hosts puts wait for their target")


def make(world, topology, nbytes, depth=2, **choice):
    return make_mailbox(world, topology, nbytes, depth, world.device, world.reach(), **choice)


@pytest.mark.parametrize("transport", ["auto", "window", "messages"])
@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_contract(world, check, transport):
    if transport == "window":
        skip_unless_passive(world)
    check(world, partial(make, transport=transport))


def test_a_window_that_needs_its_owner_is_refused(world):
    world._reach = Reach(near=True, far=False)
    with pytest.raises(ConfigError, match="take 'auto' or 'messages'"):
        make(world, ring(world.size), 100, transport="window")


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_contract_with_a_window_on_each_machine(world, check):
    world._reach = Reach(near=True, far=False)
    check(world, make)


def test_a_window_on_one_machine_is_written_while_its_owner_does_nothing(world):
    reach = world.reach()
    assert reach.near
    assert world.all_gather(reach) == [reach] * world.size
    mailbox = world.mailbox(ring(world.size), LAYOUT.nbytes)
    assert mailbox.how == ("window" if reach.far is None else "window on a machine, messages between machines")
    mailbox.free()


def test_a_message_arrives_while_its_target_computes(world):
    skip_unless_passive(world)
    mailbox = world.mailbox(ring(world.size), LAYOUT.nbytes)
    x = torch.arange(400).float()
    world.barrier()
    if world.rank % 2 == 0:
        for target in mailbox.topology.targets(world.rank):
            mailbox.put({"index": torch.zeros(0, dtype=torch.int16), "value": x}, LAYOUT, [target], step=0)
    else:
        time.sleep(0.2)  # Not a call of MPI.
        memory = mailbox.transport.memory.copy()
        even = [source for source in mailbox.topology.sources(world.rank) if source % 2 == 0]
        for source in even:
            begin = mailbox._slots.message(source, 0)
            assert memory[begin : begin + 8].view(np.int64)[0] == 1
        assert sorted(mailbox.receive(LAYOUT)) == even
    mailbox.free()


@pytest.mark.parametrize("transport", ["auto", "messages"])
def test_stress(world, transport):
    counts = world.all_gather(
        stress(world, partial(make, world, transport=transport), 4000 // (world.size * (world.size - 1)), limit_s=60)
    )
    assert sum(count.sent for count in counts) == sum(count.received for count in counts)


def test_a_progress_thread_moves_long_messages_while_the_ranks_compute(world):
    if not is_possible():
        with pytest.raises(ConfigError, match="MPI4PY_RC_THREAD_LEVEL=multiple"):
            make(world, ring(world.size), 100, progress="thread")
        return
    layout = Layout((Field("x", torch.float32, 1_000_000),))
    mailbox = make(world, ring(world.size), layout.nbytes, transport="messages", progress="thread")
    assert mailbox.how == "messages, progress thread"
    x = torch.arange(1_000_000).float()
    targets = mailbox.topology.targets(world.rank)
    assert mailbox.put({"x": x}, layout, targets, step=0) == targets
    time.sleep(1.0)
    arrived = mailbox.receive(layout)
    assert sorted(arrived) == mailbox.topology.sources(world.rank)
    assert all(torch.equal(mails[0].payload["x"], x) for mails in arrived.values())
    mailbox.free()


def test_many_mailboxes_one_after_the_other(world):
    for _ in range(20):
        mailbox = world.mailbox(ring(world.size), LAYOUT.nbytes)
        exchange_all(world, mailbox, 2)
        mailbox.free()


def test_signs_of_life_come_without_messages(world):
    mailbox = world.mailbox(ring(world.size), LAYOUT.nbytes)
    deadline = time.monotonic() + 0.6
    patiently(mailbox, lambda: time.monotonic() > deadline)
    assert all(time.monotonic() - known.heard < 0.5 for known in mailbox._known.values())
    world.barrier()
    mailbox.free()
