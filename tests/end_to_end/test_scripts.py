"""Scripts that end a job: a rank that the others wait for, or one that fails; each a program of its own under MPI."""

import re
import sys
import time

import pytest
from support.runs import MPIEXEC, run_command

pytestmark = pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing")

TIMEOUT_S = 2.0
END_S = 15.0
"""How long a job may take from its first step to its end, beside the watchdog's time: launchers are slow."""

PROGRAM = """
import time
import torch
import mpicomp
from mpicomp.algorithms import EFSGD, Choco
from mpicomp.compression import TopK
from mpicomp.topology import ring

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
PREPARE
gossip = mpicomp.distribute(model, optimizer, ALGORITHM, ring, hang_timeout_s=TIMEOUT_S)
rank = gossip.world.rank
print(f"starts at {time.time()}", flush=True)
for step in range(6):
    loss = model(torch.randn(8, 4)).square().mean()
    BODY
    loss.backward()
    gossip.optimizer.step()
    gossip.optimizer.zero_grad()
AFTER
print("went on to the end", flush=True)
"""

ALGORITHMS = {"gossip": "Choco(0.2, TopK(0.5), overlap=True)", "sum": "EFSGD(TopK(0.5))"}


def run(body="pass", after="", prepare="", algorithm="gossip"):
    """Return the exit code and what was printed, of a script on 2 ranks: one at fault, and one that waits for it."""
    program = PROGRAM.replace("PREPARE", prepare).replace("ALGORITHM", ALGORITHMS[algorithm])
    program = program.replace("TIMEOUT_S", str(TIMEOUT_S)).replace("BODY", body).replace("AFTER", after)
    done = run_command(MPIEXEC, "-n", 2, sys.executable, "-c", program)
    output = done.stdout
    seconds = [time.time() - float(start) for start in re.findall(r"starts at (\d+\.\d+)", output)]
    assert not seconds or min(seconds) < TIMEOUT_S + END_S, output
    return done.returncode, output


def test_a_script_without_a_fault_goes_on_to_the_end():
    code, output = run()
    assert code == 0 and output.count("went on to the end") == 2, output


WAITS = r"rank 0 on \S+: no progress for .*: waits for rank 1 on \S+ \(PID \d+\).*hang_timeout_s"

ENDED = {
    # pytorch/pytorch#38174: a rank has fewer batches, and waits at the end for its own process to be over
    "uneven loaders": ("gossip", {"body": "if rank == 1 and step == 4: break"}, WAITS),
    "uneven loaders of a sum": ("sum", {"body": "if rank == 1 and step == 4: break"}, WAITS),
    # pytorch/audio#3749, NVIDIA-NeMo/Automodel#2468: a bad batch is left out on one rank alone
    "a batch left out on one rank": ("gossip", {"body": "if rank == 1 and step == 2: continue"}, WAITS),
    # pytorch/pytorch#54059: a collective in evaluation is reached by rank 0 alone
    "averaged() on rank 0 alone": (
        "sum",
        {"after": "if rank == 0: gossip.averaged().__enter__()"},
        "waits for all ranks .*hang_timeout_s",
    ),
    "an error on one rank": (
        "gossip",
        {"body": "if rank == 1 and step == 2: raise KeyError('a bad batch')"},
        r"rank 1 on .*KeyError: 'a bad batch'",
    ),
    "a loss that is not a number on one rank": (
        "gossip",
        {"body": "if rank == 1 and step == 2: gossip.step(lambda: loss * float('nan'))"},
        r"the loss is nan .*at step 2 on rank 1",
    ),
    "a gradient that is not a number on one rank": (
        "sum",
        {"body": "if rank == 1 and step == 2: loss = loss * float('nan')"},
        r"NaN among the values to be compressed \(first in 0.weight\) at step 2 on rank 1",
    ),
    # A process group of one rank, as under a launcher that knows nothing of MPI.
    "a model in DistributedDataParallel": (
        "gossip",
        {
            "prepare": "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, "
            "world_size=1); model = torch.nn.parallel.DistributedDataParallel(model)"
        },
        "wrapped in DistributedDataParallel, which exchanges gradients itself",
    ),
}


@pytest.mark.parametrize("name", ENDED)
def test_the_job_ends_with_this_message(name):
    algorithm, changes, message = ENDED[name]
    code, output = run(**changes, algorithm=algorithm)
    assert code != 0, output
    assert re.search(message, output, re.DOTALL), output
