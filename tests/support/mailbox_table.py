"""What every mailbox must do: one function per line of the contract, called on every rank.

`test_mailboxes.py` runs the table over the loopback, at once and with random delays;
`tests/mpi/test_window.py` over MPI. Each function takes `make`, which makes a mailbox as
``world.mailbox`` does.
"""

import time

import numpy as np
import pytest
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ExchangeError, TopologyError
from mpicomp.topology import Topology, complete, ring, star

LAYOUT = Layout((Field("index", torch.int16, 500, variable=True), Field("value", torch.float32, 500, variable=True)))
TIMEOUT_S = 20.0


def message(source, target, number):
    """Return a message that says where it belongs, of a random length."""
    random = np.random.default_rng([source, target, number])
    count = int(random.integers(0, 501))
    value = torch.from_numpy(random.standard_normal(count).astype(np.float32))
    return {"index": torch.full((count,), number % 30_000, dtype=torch.int16), "value": value}


def assert_same(payload, expected):
    assert payload.keys() == expected.keys()
    for name in expected:
        assert torch.equal(payload[name], expected[name]), name


def patiently(mailbox, is_done):
    """Wait for `is_done`, as algorithms do."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_done():
        assert time.monotonic() < deadline, "nothing happens"
        mailbox.pause()


def exchange_all(world, mailbox, count, between=lambda number: None):
    """Send `count` messages along every edge, and check that they arrive whole, once and in order."""
    sources, targets = mailbox.topology.sources(world.rank), mailbox.topology.targets(world.rank)
    sent, read = dict.fromkeys(targets, 0), dict.fromkeys(sources, 0)

    def turn():
        for target in targets:
            payload = message(world.rank, target, sent[target] + 1)
            if sent[target] < count and mailbox.put(payload, LAYOUT, [target], step=sent[target]):
                sent[target] += 1
        for source, mails in mailbox.receive(LAYOUT).items():
            for mail in mails:
                read[source] += 1
                assert (mail.number, mail.step) == (read[source], read[source] - 1)
                assert_same(mail.payload, message(source, world.rank, mail.number))
        between(sum(read.values()))
        return all(number == count for number in [*sent.values(), *read.values()])

    patiently(mailbox, turn)
    mailbox.settle()
    assert mailbox.receive(LAYOUT) == {}


def on_a_ring(world, make):
    mailbox = make(world, ring(world.size), LAYOUT.nbytes)
    exchange_all(world, mailbox, 30)
    mailbox.free()


def on_a_complete_graph_with_one_slot(world, make):
    mailbox = make(world, complete(world.size), LAYOUT.nbytes, depth=1)
    exchange_all(world, mailbox, 10)
    mailbox.free()


def on_a_star(world, make):
    mailbox = make(world, star(world.size), LAYOUT.nbytes, depth=3)
    exchange_all(world, mailbox, 20)
    mailbox.free()


def on_a_directed_cycle(world, make):
    if world.size < 3:
        return
    mixing = (np.eye(world.size) + np.roll(np.eye(world.size), 1, axis=0)) / 2
    mailbox = make(world, Topology("cycle", mixing), LAYOUT.nbytes)
    exchange_all(world, mailbox, 20)
    mailbox.free()


def with_ranks_that_have_no_neighbor(world, make):
    mailbox = make(world, Topology("nobody", np.eye(world.size)), LAYOUT.nbytes)
    assert mailbox.put(message(0, 0, 1), LAYOUT, [], step=0) == []
    assert mailbox.receive(LAYOUT) == {} and mailbox.peers() == {}
    mailbox.announce(1)
    mailbox.free()


def with_two_mailboxes_at_a_time(world, make):
    first = make(world, ring(world.size), LAYOUT.nbytes)
    second = make(world, complete(world.size), LAYOUT.nbytes)
    exchange_all(world, first, 5)
    exchange_all(world, second, 5)
    first.free()
    second.free()


def refusing_what_the_reader_has_no_room_for(world, make):
    mailbox = make(world, complete(world.size), LAYOUT.nbytes, depth=2)
    others = mailbox.topology.targets(world.rank)
    for number in (1, 2):
        payload = message(world.rank, 0, number)
        assert mailbox.put(payload, LAYOUT, others, step=7) == others
        for field in payload.values():
            field.zero_()  # The mailbox has a copy.
    assert mailbox.put(message(world.rank, 0, 3), LAYOUT, others, step=7) == []
    assert all(mailbox.room(target) == 0 for target in others)
    mailbox.settle()
    received = mailbox.receive(LAYOUT)
    assert list(received) == others
    for source, mails in received.items():
        assert [(mail.number, mail.step) for mail in mails] == [(1, 7), (2, 7)]
        for mail in mails:
            assert_same(mail.payload, message(source, 0, mail.number))
    mailbox.settle()
    assert mailbox.put(message(world.rank, 0, 3), LAYOUT, others, step=8) == others
    mailbox.free()


def knowing_what_the_neighbors_do(world, make):
    mailbox = make(world, ring(world.size), LAYOUT.nbytes)
    assert all(peer.step == 0 and not peer.is_done and not peer.has_ended for peer in mailbox.peers().values())
    world.barrier()
    mailbox.announce(10 + world.rank)
    patiently(mailbox, lambda: all(peer.step >= 10 + rank for rank, peer in mailbox.peers().items()))
    mailbox.announce(20 + world.rank, is_done=True)
    patiently(mailbox, lambda: all(peer.is_done for peer in mailbox.peers().values()))
    assert {rank: peer.step for rank, peer in mailbox.peers().items()} == {
        rank: 20 + rank for rank in mailbox.topology.sources(world.rank)
    }
    mailbox.free()


def counting_bytes(world, make):
    mailbox = make(world, ring(world.size), LAYOUT.nbytes)
    targets = mailbox.topology.targets(world.rank)
    payload = message(1, 2, 3)
    mailbox.put(payload, LAYOUT, targets, step=0)
    assert mailbox.bytes_sent == len(targets) * (32 + LAYOUT.nbytes_of(payload))
    mailbox.free()


def refusing_a_message_that_is_too_long(world, make):
    mailbox = make(world, ring(world.size), 100)
    if mailbox.topology.targets(world.rank):
        with pytest.raises(
            ExchangeError, match=r"a message of \d+ bytes does not fit the mailbox, whose slots hold 100"
        ):
            mailbox.put(
                {"x": torch.zeros(101)},
                Layout((Field("x", torch.float32, 101),)),
                mailbox.topology.targets(world.rank),
                step=0,
            )
    mailbox.free()


def refusing_a_topology_of_another_size(world, make):
    with pytest.raises(TopologyError, match=f"made for {world.size + 1} ranks"):
        make(world, ring(world.size + 1), 100)


TABLE = [
    on_a_ring,
    on_a_complete_graph_with_one_slot,
    on_a_star,
    on_a_directed_cycle,
    with_ranks_that_have_no_neighbor,
    with_two_mailboxes_at_a_time,
    refusing_what_the_reader_has_no_room_for,
    knowing_what_the_neighbors_do,
    counting_bytes,
    refusing_a_message_that_is_too_long,
    refusing_a_topology_of_another_size,
]
