"""The asynchronous methods, staged on a simulated GPU: no races, and the bits of the plain run.

The synchronous ones are in ``tests/mpi/test_device_staging.py``: exchanges of the loopback have no staging.
"""

import numpy as np
import pytest
from support import quadratic
from support.simulated_gpu import on_simulated_gpu, simulate_staging

from mpicomp.algorithms import ADPSGD, ALGORITHMS, ASGD, DCASGD, AsynchronousAlgorithm, DCGossip
from mpicomp.compression import TopK
from mpicomp.exchange.loopback import run
from mpicomp.topology import complete_bipartite, ring

METHODS = {
    "asgd": ASGD(),
    "asgd_topk": ASGD(compressor=TopK(0.5)),
    "dc_asgd": DCASGD(lambda0=0.5),
    "dc_asgd_topk": DCASGD(compressor=TopK(0.5)),
    "dc_gossip": DCGossip(0.5),
    "dc_gossip_topk": DCGossip(0.3, compressor=TopK(0.5)),
    "ad_psgd": ADPSGD(),
}

assert {type(method) for method in METHODS.values()} == {
    kind for kind in ALGORITHMS.values() if issubclass(kind, AsynchronousAlgorithm)
}


@pytest.mark.parametrize("name", METHODS)
def test_same_bits_and_no_races(name, monkeypatch):
    method = METHODS[name]
    hubs = getattr(method, "hubs", 0)
    topology = complete_bipartite(hubs + 4, hubs) if hubs else ring(6)
    paces = np.linspace(1, 3, topology.size)
    expected = quadratic.train_asynchronously(method, topology, 20, paces)
    gpus = []

    def run_on_gpus(size, serve, **options):
        def serve_on_gpu(world):
            with on_simulated_gpu() as gpu:
                gpus.append(gpu)
                return serve(world)

        return run(size, serve_on_gpu, **options)

    simulate_staging(monkeypatch)
    monkeypatch.setattr(quadratic, "run", run_on_gpus)
    found = quadratic.train_asynchronously(method, topology, 20, paces)
    assert np.array_equal(found.x, expected.x)
    assert found.served == expected.served
    assert len(gpus) == topology.size
    for gpu in gpus:
        assert gpu.races == []
        assert gpu.delayed >= 20 and gpu.ordered >= 20
