"""Messages of random sizes with random pauses, all to all, every word of them checked.

Each sender and number has a message of its own, which the receiver can make too: a word that is missing, old, or of
another message is seen, whatever the mailbox's own checksums say.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from mpicomp.compression.message import Field, Layout
from mpicomp.topology import complete

WORDS = 8000
LAYOUT = Layout((Field("x", torch.int32, WORDS, variable=True),))


@dataclass(frozen=True)
class Counts:
    """What one rank has done; times in s."""

    sent: int
    received: int
    refused: int
    torn: int
    nbytes: int
    seconds: float


def content(source, target, number):
    """Return message `number` from `source` to `target`: short ones, and one of 16 of up to 32 KB."""
    begin = ((source * 64 + target) * 2**20 + number) * 2_654_435_761 % 2**30
    length = begin % (WORDS + 1 if number % 16 == 0 else 300)
    return torch.arange(begin, begin + length, dtype=torch.int32)


def stress(world, make, count, limit_s, seed=0):
    """Send `count` messages along every edge of a complete graph and check what arrives; collective on all ranks.

    `make` makes a mailbox as ``world.mailbox`` does; it is given back before this returns.
    """
    random = np.random.default_rng([seed, world.rank])
    mailbox = make(complete(world.size), LAYOUT.nbytes, depth=3)
    others = mailbox.topology.targets(world.rank)
    sent, read = dict.fromkeys(others, 0), dict.fromkeys(others, 0)
    refused = 0
    x = torch.randn(60, 60)
    begin = time.monotonic()
    while any(number < count for number in [*sent.values(), *read.values()]):
        assert time.monotonic() < begin + limit_s, f"rank {world.rank} after {limit_s} s: sent {sent}, received {read}"
        for target in others:
            if sent[target] == count:
                continue
            payload = {"x": content(world.rank, target, sent[target] + 1)}
            if mailbox.put(payload, LAYOUT, [target], step=sent[target]):
                sent[target] += 1
            else:
                refused += 1
        for source, mails in mailbox.receive(LAYOUT).items():
            for mail in mails:
                read[source] += 1
                assert mail.number == read[source] and mail.step == read[source] - 1, (source, mail, read[source])
                assert torch.equal(mail.payload["x"], content(source, world.rank, mail.number)), (source, mail)
        dice = random.random()
        if dice < 0.02:
            time.sleep(random.exponential(2e-4))
        elif dice < 0.04:
            for _ in range(int(random.exponential(10))):
                torch.mm(x, x)
        elif dice < 0.5:
            mailbox.pause()
    mailbox.settle()
    seconds = time.monotonic() - begin
    assert mailbox.receive(LAYOUT) == {}
    counts = Counts(sum(sent.values()), sum(read.values()), refused, mailbox.torn, mailbox.bytes_sent, seconds)
    mailbox.free()
    return counts
