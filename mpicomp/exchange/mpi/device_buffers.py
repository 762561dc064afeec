"""Whether MPI takes memory of a GPU: what the library says of itself, and what comes of trying.

Messages pass through pinned host memory in any case (`mpicomp.exchange.staging`): that nothing else is faster has not
been shown on a GPU yet, nor the opposite. So this is for people: ``mpicomp doctor`` prints it. A library "built with
CUDA support" may still crash, and one without it does so for sure, with a segmentation fault: the trial is a program of
its own, one rank that sends to itself. Between ranks, which take other paths through the library, run it yourself::

    mpiexec -n 2 python -m mpicomp.exchange.mpi.device_buffers cuda messages mailbox sums
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpicomp.exchange.launcher import without_launcher
from mpicomp.exchange.placement import Gpu

if TYPE_CHECKING:
    from mpicomp.exchange.mpi.world import MpiWorld

RIGHT = "right"
"""The outcome of a use whose bytes were compared, every one."""

_CUDA = 0
"""MPICH's MPIX_GPU_SUPPORT_CUDA."""


def ask(library: Any, environ: Mapping[str, str]) -> dict[str, bool]:
    """Return what the loaded MPI says of memory of CUDA GPUs, by whom was asked; empty if nobody could be.

    Args:
        library: the loaded library, a `ctypes.CDLL`.
        environ: where Cray MPICH and MPICH are told to use GPUs or not.

    """
    answers: dict[str, bool] = {}
    if query := getattr(library, "MPIX_Query_cuda_support", None):  # Open MPI, MPICH, and those made from it
        answers["MPIX_Query_cuda_support"] = bool(query())
    if query := getattr(library, "MPIX_GPU_query_support", None):  # MPICH
        answer = ctypes.c_int(0)
        if query(ctypes.c_int(_CUDA), ctypes.byref(answer)) == 0:
            answers["MPIX_GPU_query_support"] = bool(answer.value)
    if (flag := getattr(library, "opal_built_with_cuda_support", None)) is not None:  # Open MPI: a variable
        answers["opal_built_with_cuda_support"] = bool(ctypes.cast(flag, ctypes.POINTER(ctypes.c_bool))[0])
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU"):
        if name in environ:
            answers[name] = environ[name].strip().lower() in ("1", "y", "yes", "true", "on")
    return answers


def trial_of(gpu: Gpu, environ: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of a program that hands memory of `gpu` to MPI, alone."""
    command = [sys.executable, "-m", __spec__.name, "cuda"]
    return command, without_launcher(environ) | {"CUDA_VISIBLE_DEVICES": gpu.uuid}


def try_uses(command: Sequence[str], environ: Mapping[str, str], timeout_s: float) -> dict[str, str]:
    """Return what came of each of `USES` in a program of its own: `RIGHT`, or what went wrong.

    A use that crashes the program is tried once; those behind it are tried in a new one. One that does not end ends
    the trial: no more than `timeout_s` seconds are spent.
    """
    deadline = time.monotonic() + timeout_s
    outcomes: dict[str, str] = {}
    while rest := [use for use in USES if use not in outcomes]:
        output, ending = _run([*command, *rest], environ, deadline)
        told = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
        outcomes |= {use: told[use] for use in rest if use in told}
        if failed := next((use for use in rest if use not in outcomes), None):
            outcomes[failed] = ending or f"no answer in {timeout_s:g} s"
            if not ending:
                outcomes |= {use: "not tried" for use in rest if use not in outcomes}
    return {use: outcomes[use] for use in USES}


def summarize(everywhere: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the outcomes of all ranks as one, by use: `RIGHT` only if it is for all that tried."""
    return {
        use: next((outcomes[use] for outcomes in tried if outcomes[use] != RIGHT), RIGHT)
        for tried in [[outcomes for outcomes in everywhere if outcomes]]
        if tried
        for use in USES
    }


def _run(command: Sequence[str], environ: Mapping[str, str], deadline: float) -> tuple[str, str]:
    """Return what a program has printed, and how it ended: empty if it had not ended by the deadline."""
    process = subprocess.Popen(
        command,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0], ""
    if process.returncode < 0:
        return output, f"crashed ({signal.Signals(-process.returncode).name})"
    lines = errors.strip().splitlines()
    return output, f"failed with exit code {process.returncode}{f': {lines[-1]}' if lines else ''}"


def _try_messages(world: MpiWorld, sent: Tensor, received: Tensor) -> None:
    """Send `sent` to the next rank, as neighbors do; `received` comes from the one before."""
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for request in [world.comm.Irecv(received, source), world.comm.Isend(sent, to)]:
        world.wait(request)


def _try_mailbox(world: MpiWorld, sent: Tensor, received: Tensor) -> None:
    """Put `sent` into the next rank's window, and get what has come into the own one."""
    from mpicomp.exchange.mailbox.window import allocate

    window = allocate(world.comm, sent.numel())
    window.Put(sent, (world.rank + 1) % world.size)
    window.Flush_all()
    world.barrier()
    window.Sync()
    window.Get(received, world.rank)
    window.Flush_all()
    world.barrier()
    window.Unlock_all()
    window.Free()


def _try_sums(world: MpiWorld, sent: Tensor, received: Tensor) -> None:
    """Add up over all ranks what only the rank before has, so that `received` is its `sent`."""
    # Each rank's vector has a place of its own in the sum, which is of floating-point numbers, as sums are.
    from mpicomp.exchange.mpi.library import MPI

    width = sent.numel()
    mine = torch.zeros(world.size * width, dtype=torch.float32, device=sent.device)
    mine[world.rank * width :][:width] = sent
    total = torch.empty_like(mine)
    _finish_copies(sent.device)
    world.wait(world.comm.Iallreduce(mine, total, op=MPI.SUM))
    received.copy_(total[(world.rank - 1) % world.size * width :][:width])


USES: dict[str, Callable[[MpiWorld, Tensor, Tensor], None]] = {
    "messages": _try_messages,
    "mailbox": _try_mailbox,
    "sums": _try_sums,
}

NUMELS = (1, 1000, 65_537, 2**20)
"""Bytes tried: MPIs send short and long messages in other ways."""


def _finish_copies(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # MPI does not know torch's streams


def _pattern(numel: int, rank: int) -> Tensor:
    return ((torch.arange(numel) * 37 + rank * 101) % 251).to(torch.uint8)


def main(kind: str, uses: Sequence[str]) -> None:
    """Try `uses` with tensors on a device of `kind`, and print a line for each."""
    from mpicomp.exchange.mpi.world import MpiWorld

    world = MpiWorld.from_environment("cuda" if kind == "cuda" else "cpu", allow_shared_gpu=True)
    for use in uses:
        outcome = RIGHT
        for numel in NUMELS:
            sent = _pattern(numel, world.rank).to(world.device)
            received = torch.full_like(sent, 255)
            _finish_copies(world.device)
            USES[use](world, sent, received)
            if not torch.equal(received.cpu(), _pattern(numel, (world.rank - 1) % world.size)):
                outcome = f"wrong bytes, of {numel}, on rank {world.rank}"
        wrong = [other for other in world.all_gather(outcome) if other != RIGHT]
        if world.rank == 0:
            print(f"{use}: {wrong[0] if wrong else RIGHT}", flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(sys.argv[1], sys.argv[2:])
