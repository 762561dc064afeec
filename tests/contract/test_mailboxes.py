"""The contract of mailboxes over the loopback, at every size, at once and with late and torn writes."""

import pytest
from support.mailbox_table import TABLE

from mpicomp.exchange import loopback
from mpicomp.exchange.loopback.mailbox import Delays


def make(world, *args, **options):
    return world.mailbox(*args, **options)


@pytest.mark.parametrize("delays", [None, Delays(seed=1), Delays(seed=2, turns=200)], ids=["at once", "late", "later"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_loopback(check, size, delays):
    loopback.run(size, check, make, delays=delays)
