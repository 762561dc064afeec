"""The driver that `tests/support/driver_table.py` stands in for elsewhere."""

import os
import shutil
import subprocess

import pytest
import torch

from mpicomp.exchange.mpi.device_buffers import RIGHT, USES, trial_of, try_uses
from mpicomp.exchange.placement import LEAST_FREE, Driver, check_age, only_gpu, visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch can use"),
]


def test_gpus_are_those_of_nvidia_smi():
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no nvidia-smi")
    listed = subprocess.run(["nvidia-smi", "-L"], check=True, capture_output=True, text=True).stdout
    for gpu in visible_gpus(Driver()):
        assert f"UUID: {gpu.uuid})" in listed
        assert gpu.name in listed


def test_a_gpu_is_claimed():
    driver = Driver()
    gpu = only_gpu("cuda", driver)
    free, total = driver.start(gpu)
    assert LEAST_FREE < free <= total
    assert torch.cuda.current_device() == gpu.index
    assert gpu.cores is None or gpu.cores <= set(range(os.cpu_count()))
    check_age(gpu, driver.architectures(), has_triton=True)


def test_the_trial_of_device_buffers_ends():
    """Whatever this MPI does with them: most crash."""
    outcomes = try_uses(*trial_of(only_gpu("cuda"), os.environ), 120)
    assert list(outcomes) == list(USES)
    assert all(outcome == RIGHT or outcome.startswith(("crashed", "failed")) for outcome in outcomes.values()), outcomes
