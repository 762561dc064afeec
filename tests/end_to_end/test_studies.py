"""A short run of each study against its stored outcome."""

import os
import sys
from pathlib import Path

import pytest
from support.runs import run_command

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*/study.toml"))


@pytest.mark.skipif("MPICOMP_DATA" not in os.environ, reason="MPICOMP_DATA is not set: no folder of real data")
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_short_run_gives_what_is_stored(path):
    done = run_command(sys.executable, ROOT / "scripts" / "study", path.parent, "--check", timeout=120)
    assert done.returncode == 0, done.stdout
    assert "as stored, loss" in done.stdout
