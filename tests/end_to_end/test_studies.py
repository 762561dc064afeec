"""A short run of each study against its stored outcome."""

import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*/study.toml"))


@pytest.mark.skipif("MPICOMP_DATA" not in os.environ, reason="MPICOMP_DATA is not set: no folder of real data")
@pytest.mark.every_case
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_short_run_gives_what_is_stored(path, monkeypatch, capsys):
    """In this process, which saves a start for each."""
    script = ROOT / "scripts" / "study"
    monkeypatch.setattr(sys, "argv", [str(script), str(path.parent), "--check"])
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds a folder
    runpy.run_path(str(script), run_name="__main__")  # exits if it is not as stored
    assert "as stored, loss" in capsys.readouterr().out
