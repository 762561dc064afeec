"""The asynchronous methods, staged on a simulated GPU: no races, and the bits of the plain run.

The synchronous ones are in ``tests/mpi/test_device_staging.py``: exchanges of the loopback have no staging.
"""

import numpy as np
import pytest
from support import quadratic
from support.methods import ASYNCHRONOUS
from support.simulated_gpu import on_simulated_gpu, simulate_staging

from mpicomp.exchange.loopback import run
from mpicomp.topology import complete_bipartite, ring


def train(name, monkeypatch, **options):
    """Return what comes out on the host, what comes out on simulated GPUs, and these."""
    method = ASYNCHRONOUS[name]
    hubs = getattr(method, "hubs", 0)
    topology = complete_bipartite(hubs + 4, hubs) if hubs else ring(6)
    paces = np.linspace(1, 3, topology.size)
    expected = quadratic.train_asynchronously(method, topology, 20, paces)
    gpus = []

    def run_on_gpus(size, serve, **simulation):
        def serve_on_gpu(world):
            with on_simulated_gpu(**options) as gpu:
                gpus.append(gpu)
                return serve(world)

        return run(size, serve_on_gpu, **simulation)

    simulate_staging(monkeypatch)
    monkeypatch.setattr(quadratic, "run", run_on_gpus)
    return expected, quadratic.train_asynchronously(method, topology, 20, paces), gpus


@pytest.mark.parametrize("name", ASYNCHRONOUS)
def test_same_bits_and_no_races(name, monkeypatch):
    expected, found, gpus = train(name, monkeypatch)
    assert np.array_equal(found.x, expected.x)
    assert found.served == expected.served
    assert len(gpus) == len(found.x)
    messages = 18 if name == "ad_psgd" else 20  # a passive rank has as many as chance asks it for
    for gpu in gpus:
        assert gpu.races == []
        assert gpu.delayed >= 3 * messages and gpu.ordered >= messages  # packed, copied to the host, and loaded


@pytest.mark.parametrize("name", ["asgd", "dc_gossip"])
def test_without_a_wait_all_ranks_race(name, monkeypatch):
    first = train(name, monkeypatch)[-1][0]
    (site,) = (site for site in first.sites if site.endswith("synchronize"))
    monkeypatch.undo()
    *_, gpus = train(name, monkeypatch, is_late=False, left_out=site)
    assert all(gpu.races for gpu in gpus)
