"""pytest on several ranks at a time: ``mpiexec -n 3 python -m pytest tests/mpi``.

Verdicts are collective: a phase of a test that fails on one rank fails on all, with that rank's traceback, and the
next test starts in step. Rank 0 speaks for all. A rank that fails while the others wait for its messages ends the job
after `GRACE_S`; a deadlock without a failure ends it when pytest's `faulthandler_timeout` has printed all stacks.

Fixtures: `world`, a fresh `MpiWorld` per test, so that what a failed test left unfinished cannot meet the next one;
`shared_tmp_path`, one folder for all ranks.
"""

import os
import sys
import time

import pytest
import torch

from mpicomp.exchange.mpi.library import MPI
from mpicomp.exchange.mpi.world import MpiWorld

GRACE_S = 15.0
VERDICTS = MpiWorld.from_environment(device="cpu")


@pytest.fixture
def world():
    world = MpiWorld.from_environment(device="cpu")
    yield world
    world.comm.Free()


@pytest.fixture
def shared_tmp_path(tmp_path_factory, request):
    """A folder that all ranks see."""
    made = tmp_path_factory.mktemp("shared") if VERDICTS.rank == 0 else None
    return VERDICTS.broadcast(made)


def pytest_report_header():
    version = MPI.Get_library_version().splitlines()[0].split(",")[0]
    return f"MPI: {' '.join(version.split())}, rank {VERDICTS.rank} of {VERDICTS.size}, torch {torch.__version__}"


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    if VERDICTS.rank != 0:
        config.get_terminal_writer()._file = open(os.devnull, "w")  # noqa: PTH123, SIM115


def pytest_collection_finish(session):
    names = VERDICTS.all_gather([item.nodeid for item in session.items])
    if any(other != names[0] for other in names):
        pytest.exit("the ranks have collected different tests: see the errors above", returncode=3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    mine = report.outcome, "" if report.passed else _text(report)
    _meet(item, report, mine[1])
    verdicts = VERDICTS.all_gather(mine)
    outcomes = {outcome for outcome, _ in verdicts}
    if len(outcomes) > 1 or report.failed:
        report.outcome = "failed"
        report.longrepr = "\n".join(
            f"---- rank {rank} of {VERDICTS.size}: {outcome}\n{text}" for rank, (outcome, text) in enumerate(verdicts)
        )
    return report


def _text(report):
    sections = "".join(f"\n---- {title}\n{content}" for title, content in report.sections)
    return f"{report.longreprtext if report.failed else report.longrepr}{sections}"


def _meet(item, report, text):
    """Wait for all ranks; a failed one ends the job if the others never come: they wait for what it did not send."""
    arrival = VERDICTS.comm.Ibarrier()
    deadline = time.monotonic() + GRACE_S
    while report.failed and not arrival.Test():
        if time.monotonic() > deadline:
            item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
            sys.stderr.write(f"\n{item.nodeid}: rank {VERDICTS.rank} failed and others hang:\n{text}\n")
            VERDICTS.abort(1)
        time.sleep(0.001)
    VERDICTS.wait(arrival)
