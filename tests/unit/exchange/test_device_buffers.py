"""What MPI says of GPU memory, and a trial that survives what it tries. Neither MPI nor a GPU is needed."""

import ctypes
import os
import sys
import time
from types import SimpleNamespace

import pytest

from mpicomp.exchange.launcher import launched_by, without_launcher
from mpicomp.exchange.mpi.device_buffers import RIGHT, USES, ask, summarize, trial_of, try_uses
from mpicomp.exchange.placement import Gpu


def mpich(code, answer, status=0):
    """Return a library that answers `answer` when it is asked for the kind of GPU `code`."""

    def query(kind, is_supported):
        is_supported._obj.value = answer if kind.value == code else 0
        return status

    return SimpleNamespace(MPIX_GPU_query_support=query)


@pytest.mark.parametrize("is_built", [True, False])
def test_open_mpi_is_asked_twice(is_built):
    library = SimpleNamespace(
        MPIX_Query_cuda_support=lambda: 1, opal_built_with_cuda_support=ctypes.pointer(ctypes.c_bool(is_built))
    )
    assert ask(library, {}) == {"MPIX_Query_cuda_support": True, "opal_built_with_cuda_support": is_built}


def test_mpich_is_asked_for_cuda():
    assert ask(mpich(0, 1), {}) == {"MPIX_GPU_query_support": True}
    assert ask(mpich(2, 1), {}) == {"MPIX_GPU_query_support": False}  # ROCm
    assert ask(mpich(0, 1, status=1), {}) == {}  # an error is no answer


@pytest.mark.parametrize("name", ["MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU"])
def test_gpus_may_be_switched_off_in_the_environment(name):
    switched = [ask(SimpleNamespace(), {name: value})[name] for value in ("1", "yes", "0", "")]
    assert switched == [True, True, False, False]


def test_a_library_that_cannot_be_asked_says_nothing():
    assert ask(SimpleNamespace(), {}) == {}


def try_program(code, timeout_s=20.0):
    return try_uses([sys.executable, "-S", "-c", f"import os, signal, sys, time\n{code}"], os.environ, timeout_s)


def test_a_trial_that_goes_well():
    assert try_program("for use in sys.argv[1:]: print(f'{use}: right')") == dict.fromkeys(USES, RIGHT)


def test_a_crash_is_an_outcome_and_the_other_uses_are_tried():
    outcomes = try_program(
        "for use in sys.argv[1:]:\n"
        "    if use == 'mailbox': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    print(f'{use}: right', flush=True)"
    )
    assert outcomes == {"messages": RIGHT, "mailbox": "crashed (SIGSEGV)", "sums": RIGHT}


def test_a_trial_that_hangs_is_ended_with_all_that_it_has_started():
    start = time.monotonic()
    outcomes = try_program(
        "print('messages: right', flush=True)\n"
        "os.fork()  # both hold the pipe open\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)",
        timeout_s=1.0,
    )
    assert outcomes == {"messages": RIGHT, "mailbox": "no answer in 1 s", "sums": "not tried"}
    assert time.monotonic() - start < 10


def test_a_trial_that_fails_says_why():
    outcomes = try_program("print('messages: wrong bytes, of 1, on rank 0'); sys.exit('no GPU left')")
    failed = "failed with exit code 1: no GPU left"
    assert outcomes == {"messages": "wrong bytes, of 1, on rank 0", "mailbox": failed, "sums": failed}


def test_one_rank_that_fails_is_what_all_are_told():
    right = dict.fromkeys(USES, RIGHT)
    assert summarize([{}, {}]) == {}
    assert summarize([{}, right, right]) == right
    assert summarize([right, {}, right | {"sums": "crashed (SIGBUS)"}]) == right | {"sums": "crashed (SIGBUS)"}


def test_the_trial_is_alone_on_the_gpu_of_its_rank():
    launched = {"PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "1"}
    kept = {
        "PATH": "/bin",
        "OMPI_MCA_pml": "ucx",
        "UCX_TLS": "all",
        "MPIR_CVAR_ENABLE_GPU": "1",
        "PMIX_MCA_gds": "hash",
    }
    command, environ = trial_of(Gpu(1, "GPU-7", "H100", (9, 0)), {**launched, **kept, "CUDA_VISIBLE_DEVICES": "2,3"})
    assert command == [sys.executable, "-m", "mpicomp.exchange.mpi.device_buffers", "cuda"]
    assert environ == {**kept, "CUDA_VISIBLE_DEVICES": "GPU-7"}
    assert launched_by(launched)
    assert launched_by(without_launcher(launched)) is None
