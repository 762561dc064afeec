"""The contract of exchanges over the loopback, at every size."""

import pytest
from support.exchange_table import TABLE

from mpicomp.exchange import loopback


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
def test_loopback(check, size):
    loopback.run(size, check)
