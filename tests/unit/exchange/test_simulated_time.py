"""Simulated time of synchronous methods: a step takes as long as gradients, ports and latency say."""

from functools import partial
from pathlib import Path

import pytest
import torch

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.compression.identity import Identity
from mpicomp.compression.message import Spec
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links, Network
from mpicomp.exchange.sums.aggregate import Aggregator
from mpicomp.replica.gradient_delay import GradientDelay
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train
from mpicomp.topology import ring

METHODS = Path(__file__).resolve().parents[3] / "configs" / "methods"
GRADIENT_S, LATENCY_S, BYTES_PER_S = 0.1, 0.003, 1e5
SHORT = ["training.steps=6", "schedule.kind=constant", "schedule.warmup=", "checkpoint.every_minutes=0"]
SHORT += ["run.log_every=3", "run.evaluate_every_epochs=0.02"]
TIMES = [f"simulation.gradient_s={GRADIENT_S}", f"simulation.latency_s={LATENCY_S}"]
TIMES += [f"simulation.bytes_per_s={BYTES_PER_S}"]


def simulate(path, size, *overrides, folder=None, checkpoint=None):
    """Return the result of a short run."""
    config = RunConfig.load(path, [*SHORT, *TIMES, *overrides])
    if folder and not folder.path.exists():
        folder = RunFolder.create(folder.path)
        folder.save_config(config)
    links = config.simulation.links()
    return run(size, partial(train, config, folder=folder, checkpoint=checkpoint), simulated=links)[0]


def transmission_s(result):
    """Return the seconds of a step in which a rank's port sends."""
    return result.bytes_sent[0] / result.steps / BYTES_PER_S


@pytest.mark.parametrize(("topology", "size"), [("ring", 4), ("torus", 16), ("complete", 4)])
def test_a_step_is_the_gradient_then_the_messages_one_after_another(topology, size):
    result = simulate(METHODS / "dpsgd.toml", size, f"topology.kind={topology}")
    assert result.seconds / result.steps == pytest.approx(GRADIENT_S + transmission_s(result) + LATENCY_S, rel=1e-6)


def test_a_hub_is_as_slow_as_its_own_port():
    # Three workers send a message each, which arrive one after another; then the hub sends three.
    result = simulate(METHODS / "gmc.toml", 4, "topology.kind=star", "compression.kind=identity", "compression.ratio=")
    message_s = result.bytes_sent[1] / result.steps / BYTES_PER_S
    assert result.bytes_sent[0] == 3 * result.bytes_sent[1]
    assert result.seconds / result.steps == pytest.approx(GRADIENT_S + 6 * message_s + 2 * LATENCY_S, rel=1e-6)


def test_an_all_reduce_takes_its_bytes_and_the_latency_of_all_its_steps():
    result = simulate(METHODS / "ssgd.toml", 4)
    expected = GRADIENT_S + transmission_s(result) + 6 * LATENCY_S
    assert result.seconds / result.steps == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("node_size", "hops"), [(2, 2), (4, 0)])
def test_an_all_reduce_takes_time_between_nodes_only(node_size, hops):
    result = simulate(METHODS / "ssgd.toml", 4, f"simulation.node_size={node_size}")
    expected = GRADIENT_S + (transmission_s(result) + hops * LATENCY_S if hops else 0)
    assert result.seconds / result.steps == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("gradient_s", [0.001, 1.0])
def test_messages_with_overlap_travel_during_the_gradient(gradient_s):
    dense = ["compression.kind=identity", "compression.ratio=", "algorithm.overlap=true"]
    result = simulate(METHODS / "choco.toml", 4, *dense, f"simulation.gradient_s={gradient_s}")
    expected = max(gradient_s, transmission_s(result) + LATENCY_S)
    assert result.seconds / result.steps == pytest.approx(expected, rel=0.01)


def test_streaming_diloco_hides_what_diloco_waits_for():
    # 12 steps of two periods; a period of DiLoCo sends the model in one of its steps, and all wait for it.
    local = ["training.steps=12", "algorithm.period=6", "simulation.gradient_s=0.3"]
    waiting = simulate(METHODS / "diloco.toml", 4, *local)
    expected = 0.3 + transmission_s(waiting) + 6 * LATENCY_S / 6
    assert waiting.seconds / waiting.steps == pytest.approx(expected, rel=1e-6)
    streaming = simulate(METHODS / "streaming_diloco.toml", 4, *local, "algorithm.fragments=2", "algorithm.delay=3")
    assert streaming.seconds / streaming.steps == pytest.approx(0.3, rel=1e-3)
    assert waiting.seconds > 1.3 * streaming.seconds
    assert sum(streaming.bytes_sent) > 0.9 * sum(waiting.bytes_sent)  # the last fragment is still under way


def test_all_wait_for_a_slow_rank():
    result = simulate(METHODS / "dpsgd.toml", 4, "slow.ranks=[2]", "slow.factor=4")
    # Ranks that are ahead wait in the first steps; the last record waits for the slow one.
    assert result.seconds / result.steps == pytest.approx(4 * GRADIENT_S + transmission_s(result) + LATENCY_S, rel=0.02)


def test_what_is_learned_does_not_depend_on_the_links():
    slow, fast = (simulate(METHODS / "choco.toml", 4, *more) for more in ([], ["simulation.bytes_per_s=1e12"]))
    assert slow.seconds > 1.1 * fast.seconds
    assert (slow.train_loss, slow.bytes_sent) == (fast.train_loss, fast.bytes_sent)


def test_a_run_that_continues_has_the_same_seconds(tmp_path):
    stops = ["checkpoint.every_steps=3", "checkpoint.every_minutes="]
    whole, half = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "half")
    simulate(METHODS / "choco.toml", 4, *stops, folder=whole)
    simulate(METHODS / "choco.toml", 4, *stops, "training.steps=3", folder=half)
    checkpoint = Checkpoints(half.checkpoints_path).latest()
    simulate(METHODS / "choco.toml", 4, *stops, folder=half, checkpoint=checkpoint)
    assert len(whole.records()) > 3
    for continued, uninterrupted in zip(half.records(), whole.records(), strict=True):
        assert continued["seconds"] == pytest.approx(uninterrupted["seconds"], abs=1e-12)


def test_ports_share_what_is_sent_at_once_and_serve_the_rest_in_order():
    network = Network(4, Links(latency_s=0.5, bytes_per_s=100.0))
    second = 10**9
    assert network.send(0, {1: 100, 3: 100}, now_ns=0) == {1: 2.5 * second, 3: 2.5 * second}
    assert network.send(2, {1: 100, 3: 100}, now_ns=0) == {1: 2.5 * second, 3: 2.5 * second}  # ports take in both
    assert network.send(0, {2: 100}, now_ns=0) == {2: 3.5 * second}  # after the first two, out of the same port
    assert network.send(3, {1: 100}, now_ns=second) == {1: 3.5 * second}  # after the others, into the same port
    assert network.free_ns() == 3 * second
    assert network.send(1, {0: 100}, now_ns=5 * second) == {0: 6.5 * second}


def test_ports_may_differ_and_a_message_waits_for_the_slower_one():
    network = Network(3, Links(bytes_per_s_of_nodes=(100.0, 50.0, 100.0)))
    second = 10**9
    assert network.send(0, {1: 100, 2: 100}, now_ns=0) == {1: 2 * second, 2: 2 * second}
    assert network.send(2, {1: 100}, now_ns=0) == {1: 4 * second}  # rank 1 takes in 200 at 50
    assert network.send(1, {0: 100}, now_ns=0) == {0: 2 * second}
    assert network.all_reduce_ns(100, range(3)) == 2 * second
    assert network.all_reduce_ns(100, [0, 2]) == second
    with pytest.raises(ConfigError, match=r"simulation.bytes_per_s has 2 entries for 3 nodes"):
        Network(3, Links(bytes_per_s_of_nodes=(100.0, 50.0)))


def test_what_travels_in_several_hops_goes_on_during_a_gradient():
    """A sum over a ring of 4: six hops of a millisecond, which ranks relay during a gradient of ten."""
    spec = Spec.flat(8, torch.float32)

    def serve(world):
        delay = GradientDelay(gradient_s=0.01)
        delay.sleep, delay.rest = world.sleep, world.rest
        x, mean = torch.full((8,), float(world.rank)), torch.empty(8)
        pending = Aggregator(world.exchange(ring(4))).start(Identity().compress(x, spec, None), Identity(), spec)
        delay.keep(0.0, pending.test)
        pending.wait(mean)
        return world.now(), mean.tolist()

    assert run(4, serve, simulated=Links(latency_s=1e-3)) == [(0.01, [1.5] * 8)] * 4
