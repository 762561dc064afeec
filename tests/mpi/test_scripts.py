"""The table of scripts on MPI."""

import pytest
from support.script_table import params


@pytest.mark.parametrize("row", params())
def test_script(row, world):
    if world.size < row.ranks:
        pytest.skip(f"needs {row.ranks} ranks")
    row.check(world)
