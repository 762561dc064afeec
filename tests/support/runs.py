"""Runs of ``mpicomp`` as a user starts them, their processes, and the comparison of what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

MPIEXEC = Path(sys.executable).parent / "mpiexec"

OPEN_MPI_HERE = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_osc": "^ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def others_long(cases):
    """Return the cases of a test, all but the first marked as long: where the first tells most, as of two MPIs."""
    return [*cases[:1], *(pytest.param(case, marks=pytest.mark.long) for case in cases[1:])]


def mpicomp(*arguments, ranks=None, timeout=120):
    """Run a command to its end, on MPI ranks if their number is given; nothing of it is left when it hangs."""
    return _finish(start(*arguments, ranks=ranks), arguments, timeout)


def mpicomp_here(*arguments):
    """Run a command in this process, which saves the start of one; both outputs come together."""
    from mpicomp.cli import main

    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="mpicomp")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.output)


def run_program(program, *arguments, ranks, environment=(), timeout=120):
    """Run a Python program on MPI ranks to its end, as `mpicomp` runs a command."""
    return _finish(_start([program, *arguments], ranks, dict(environment)), arguments, timeout)


def run_command(*command, environ=None, cwd=None, timeout=60):
    """Run any command, such as a launcher, to its end, as `mpicomp` runs one of ours; `environ` is all of its own."""
    process = _popen(command, os.environ | OPEN_MPI_HERE if environ is None else environ, cwd)
    return _finish(process, command, timeout)


def start(*arguments, ranks=None):
    """Start a command in a process group of its own; standard error goes where output goes."""
    return _start(["-m", "mpicomp", *arguments], ranks, {})


def _start(words, ranks, environment):
    launcher = [MPIEXEC, "-n", ranks] if ranks else []
    return _popen([*launcher, sys.executable, *words], os.environ | OPEN_MPI_HERE | environment)


def _popen(command, environ, cwd=None):
    return subprocess.Popen(
        list(map(str, command)),
        env=environ,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process, arguments, timeout):
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"hung for {timeout} s: {arguments}\n{output}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def ranks_of(folder):
    """Return the process ids of the ranks that train in `folder`; launchers and their daemons are left out."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = words[1:3] == [b"-m", b"mpicomp"] or (len(words) > 1 and words[1].endswith(b"/mpicomp"))
        if is_rank and os.fsencode(folder) in words:
            found.append(int(process.name))
    return sorted(found)


def is_code(code, expected):
    """Compare exit codes; MPICH 5.0.2's mpiexec sometimes gives that of a rank that it has killed for MPI_Abort."""
    return code in (expected, 9)


def wait_until(condition, what, timeout=180):
    """Return when `condition` returns true; the limit is for a machine that is busy with other tests."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so after {timeout} s"
        time.sleep(0.02)


def records(folder):
    """Return the records of a run, without what a clock has said."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in found]


CLOCKS_AND_SHARED_GENERATORS = ("meter/seconds", "meter/total_seconds", "data/reported", "random/")
"""What differs between equal runs: the ranks of the loopback share the generators of their process."""


def assert_same_checkpoint(one, other):
    """Compare two checkpoints, all ranks, bit for bit."""
    assert one.manifest.size == other.manifest.size
    for rank in range(one.manifest.size):
        ours, theirs = one.read(rank), other.read(rank)
        assert ours.keys() == theirs.keys()
        for name in ours:
            if not name.startswith(CLOCKS_AND_SHARED_GENERATORS):
                assert _bits(ours[name]) == _bits(theirs[name]), f"rank {rank}: {name}"


def _bits(leaf):
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.shape, leaf.reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(leaf)
