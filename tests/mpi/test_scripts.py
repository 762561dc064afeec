"""The table of scripts on MPI, at up to 3 ranks: with more there is nothing new in it, and it takes minutes."""

import pytest
from support.script_table import params


@pytest.mark.parametrize("row", params())
def test_script(row, world):
    if not row.ranks <= world.size <= 3:
        pytest.skip(f"is for {row.ranks} to 3 ranks")
    row.check(world)
