"""The table of scripts over the loopback, with one core, so that ranks that share torch's generator take turns."""

import pytest
from support.script_table import params

from mpicomp.exchange import loopback


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("row", params())
def test_script(row, size):
    loopback.run(size, row.check, cores=1)
