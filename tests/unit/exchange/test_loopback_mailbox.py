"""The mailbox where the transport is at its worst: late, torn, damaged."""

import pytest
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.errors import ExchangeError
from mpicomp.exchange import loopback
from mpicomp.exchange.loopback.mailbox import Delays
from mpicomp.exchange.mailbox import slots as module
from mpicomp.topology import complete, ring

LAYOUT = Layout((Field("x", torch.float32, 200, variable=True),))


def gossip(world, count):
    """Send `count` messages to everybody; return the schedule of all arrivals, and how many looks saw torn ones."""
    mailbox = world.mailbox(complete(world.size), LAYOUT.nbytes)
    others = mailbox.topology.targets(world.rank)
    sent, log = dict.fromkeys(others, 0), []
    turn = 0
    while any(number < count for number in sent.values()) or len(log) < count * len(others):
        turn += 1
        for target in others:
            number = sent[target]
            payload = {"x": torch.arange(number % 200).float() + world.rank}
            if number < count and mailbox.put(payload, LAYOUT, [target], step=number):
                sent[target] += 1
        for source, mails in mailbox.receive(LAYOUT).items():
            for mail in mails:
                assert torch.equal(mail.payload["x"], torch.arange((mail.number - 1) % 200).float() + source)
                log.append((turn, source, mail.number))
    mailbox.free()
    return log, mailbox.torn


def test_a_run_with_the_same_seed_is_the_same_run():
    first, second, other = (loopback.run(4, gossip, 100, cores=1, delays=Delays(seed, turns=7)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_torn_messages_are_seen_and_not_taken():
    assert sum(torn for _, torn in loopback.run(3, gossip, 300, delays=Delays(3, turns=10))) > 100


def test_without_delays_nothing_is_torn():
    assert sum(torn for _, torn in loopback.run(3, gossip, 100, cores=1)) == 0


def test_a_damaged_message_is_named(monkeypatch):
    monkeypatch.setattr(module, "DAMAGED_S", 0.05)

    def function(world):
        mailbox = world.mailbox(ring(2), LAYOUT.nbytes)
        if world.rank == 0:
            mailbox.put({"x": torch.ones(50)}, LAYOUT, [1], step=0)
        mailbox.settle()
        if world.rank == 1:
            assert mailbox.transport.memory[-LAYOUT.nbytes * 2 :].any()
            begin = mailbox._slots.message(0, 0) + 100
            mailbox.transport.memory[begin] ^= 1
            while True:
                mailbox.receive(LAYOUT)

    with pytest.raises(ExchangeError, match=r"message 1 from rank 0 has had a wrong checksum for 0.05 s"):
        loopback.run(2, function)


def test_a_message_of_another_layout_is_refused():
    def function(world):
        mailbox = world.mailbox(ring(2), LAYOUT.nbytes)
        if world.rank == 0:
            mailbox.put({"x": torch.ones(50)}, LAYOUT, [1], step=0)
        mailbox.settle()
        mailbox.receive(Layout((Field("x", torch.float32, 200),)))

    with pytest.raises(ExchangeError, match="message from rank 0"):
        loopback.run(2, function)


def test_a_rank_that_fails_stops_those_that_wait_for_its_mail():
    def function(world):
        mailbox = world.mailbox(ring(3), LAYOUT.nbytes)
        if world.rank == 1:
            raise ValueError("broken on purpose")
        while not mailbox.receive(LAYOUT):
            mailbox.pause()

    with pytest.raises(ValueError, match="broken on purpose"):
        loopback.run(3, function)
