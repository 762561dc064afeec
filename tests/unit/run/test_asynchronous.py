"""The training loop of asynchronous methods, in simulated time."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.runs import assert_same_checkpoint, records

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.cli import main
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError, DivergenceError, TopologyError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.exchange.loopback.simulated_time import SimulatedScheduler
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train
from mpicomp.run.setup import Setup

HUB, GOSSIP = "configs/methods/dc_asgd.toml", "configs/methods/dc_gossip.toml"
PAIRS = "configs/methods/ad_psgd.toml"
CHOCO = "configs/methods/choco.toml"
SHORT = ["training.epochs=2", "schedule.warmup=0"]
UNEQUAL = ["slow.ranks=[3]", "slow.factor=4.0", "simulation.spread=exponential"]


@pytest.fixture
def batches(monkeypatch):
    """The batches that have been taken: ``(place, epoch, index)``."""
    taken = []
    batch = Setup.batch

    def record(self, step, place, device):
        taken.append((place, *self.assignment.position(step)))
        return batch(self, step, place, device)

    monkeypatch.setattr(Setup, "batch", record)
    return taken


def simulate(path, size, *overrides, folder=None):
    """Train on `size` ranks and return the result."""
    config = RunConfig.load(path, [*SHORT, *overrides])
    if folder:
        RunFolder.create(folder).save_config(config)
    results = run(size, lambda world: train(config, world, folder and RunFolder(folder)), simulated=Links())
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("path", [HUB, GOSSIP, PAIRS])
def test_every_batch_of_the_pile_is_taken_once(batches, path):
    result = simulate(path, 4, *UNEQUAL)
    per_epoch = 1437 // 16
    assert Counter(batches) == Counter((0, epoch, index) for epoch in range(2) for index in range(per_epoch))
    assert sum(result.gradients) == 2 * per_epoch
    assert result.gradients[3] < result.gradients[2] / 2


@pytest.mark.parametrize(("path", "trainers"), [(HUB, 3), (GOSSIP, 4), (PAIRS, 4)])
def test_equal_shares_are_taken_by_each_rank(batches, path, trainers):
    result = simulate(path, 4, "algorithm.share=equal", "data.partition=dirichlet", "data.alpha=1.0", *UNEQUAL)
    assert set(Counter(batches).values()) == {1}
    assert {gradients for gradients in result.gradients if gradients} == {len(batches) // trainers}


@pytest.mark.parametrize("share", ["by_speed", "equal"])
@pytest.mark.parametrize("path", [GOSSIP, PAIRS])
def test_the_learning_rate_is_that_of_the_batch(monkeypatch, path, share):
    """Cosine over two epochs: a fast rank is not ahead of the schedule, nor a slow one behind."""
    epochs_and_rates = []
    batch = Setup.batch

    def record(self, step, place, device):
        epochs_and_rates.append((self.epoch(step), self.optimizer.param_groups[0]["lr"]))
        return batch(self, step, place, device)

    monkeypatch.setattr(Setup, "batch", record)
    simulate(path, 4, f"algorithm.share={share}", "schedule.kind=cosine", "optimizer.lr=0.1", *UNEQUAL)
    epochs, rates = np.array(sorted(epochs_and_rates)).T
    assert epochs[-1] > 1.9
    np.testing.assert_allclose(rates, 0.05 * (1 + np.cos(np.pi * epochs / 2)), rtol=1e-9, atol=1e-12)


def test_the_loss_of_a_record_without_new_gradients_is_that_of_the_last_one():
    result = simulate(GOSSIP, 4, "algorithm.share=equal", "run.log_every=1", "simulation.gradient_s=1.0")
    assert 0 < result.train_loss < 1


def test_a_hub_has_no_model_of_its_own():
    """It has that of the workers, which train; its own batch-norm statistics would be those of the start."""
    result = simulate(HUB, 3)
    assert result.test_accuracy_local[0] is None and None not in result.test_accuracy_local[1:]


def test_one_worker_trains_as_sgd_does(tmp_path):
    plain = ["compression.kind=identity", "compression.ratio=", "downlink.kind=identity", "downlink.ratio="]
    simulate(HUB, 2, *plain, folder=tmp_path / "worker")
    simulate(HUB, 1, *plain, "algorithm.kind=sgd", "algorithm.adaptive=", "algorithm.share=", folder=tmp_path / "sgd")
    models = [RunFolder(tmp_path / name).records() for name in ("worker", "sgd")]
    assert models[0][-1]["test_accuracy"] == models[1][-1]["test_accuracy"]
    worker, sgd = (
        Checkpoints(tmp_path / name / "checkpoints").latest().read(rank) for name, rank in (("worker", 1), ("sgd", 0))
    )
    assert torch.equal(worker["model/parameters"], sgd["model/parameters"])


@pytest.mark.parametrize("path", [HUB, GOSSIP, PAIRS])
def test_a_slow_rank_holds_nobody_up(path):
    """Throughput with one of four trainers four times slower, against synchronous training in the same time."""
    size = 5 if path == HUB else 4
    slow = ["slow.ranks=[1]", "slow.factor=4.0"]
    asynchronous = simulate(path, size, *slow)
    synchronous = simulate("configs/methods/choco.toml", 4, *slow)
    rates = [sum(r.gradients or [r.steps] * r.ranks) / r.seconds for r in (asynchronous, synchronous)]
    assert rates[0] >= 2.5 * rates[1]


@pytest.mark.parametrize("path", [HUB, GOSSIP, PAIRS])
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(path, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = ["training.steps=40", "checkpoint.every_steps=8", "checkpoint.keep_last=0", "run.log_every=9"]
    options += ["run.evaluate_every_epochs=0.2", *UNEQUAL]
    overrides = [word for option in (*SHORT[1:], *options) for word in ("--set", option)]
    for folder in (whole, again):
        outcome = CliRunner().invoke(main, ["train", path, *overrides, "--simulate", "4", "--run-dir", str(folder)])
        assert outcome.exit_code == 0, outcome.output
    assert records(whole) == records(again)  # simulated time repeats itself
    for stored in sorted((again / "checkpoints").glob("step_*"))[2:0:-1]:
        outcome = CliRunner().invoke(main, ["train", "--resume", str(stored), "--simulate", "4"])
        assert outcome.exit_code == 0, outcome.output
        assert f"Going on after step {int(stored.name.removeprefix('step_'))}" in outcome.output
        assert_same_checkpoint(*(Checkpoints(folder / "checkpoints").latest() for folder in (whole, again)))
        assert records(again) == records(whole)
        for ours, theirs in zip(RunFolder(again).records(), RunFolder(whole).records(), strict=True):
            assert ours["seconds"] == pytest.approx(theirs["seconds"])  # they are simulated


def test_the_records_tell_how_late_contributions_were(tmp_path):
    result = simulate(HUB, 5, folder=tmp_path / "run")
    last = RunFolder(tmp_path / "run").records()[-1]
    assert last["delays"] == result.delays
    assert sorted(result.delays) == ["0<1", "0<2", "0<3", "0<4"]
    assert sum(map(sum, result.delays.values())) == sum(result.gradients) == sum(last["gradients"])
    assert all(np.argmax(counts) == 3 for counts in result.delays.values())
    assert last["seconds"].keys() == {"gradient", "compress", "exchange", "mix", "wait"}


def test_a_rank_that_serves_others_while_it_computes_sleeps_until_they_send(monkeypatch):
    """AD-PSGD: a gradient of a second, in which up to two neighbors ask; looking every 2 ms would be 500 naps."""
    naps, nap = [], SimulatedScheduler._nap

    def count(self, rank, *arguments, **options):
        naps.append(rank)
        return nap(self, rank, *arguments, **options)

    monkeypatch.setattr(SimulatedScheduler, "_nap", count)
    result = simulate(PAIRS, 4, *UNEQUAL)
    assert len(naps) < 20 * sum(result.gradients)


def test_public_copies_that_run_away_end_the_run():
    with pytest.raises(DivergenceError, match=r"the public copies have left the models behind .* at step \d+ on rank"):
        simulate(GOSSIP, 4, "training.epochs=6", "algorithm.gamma=1.5", "compression.ratio=0.001")


@pytest.mark.parametrize(
    ("path", "overrides", "message"),
    [
        (HUB, ["slow.ranks=[0]", "slow.factor=2.0"], "slow.ranks: rank 0 is a hub"),
        (HUB, ["data.partition=dirichlet"], "algorithm.share = 'by_speed' lets all ranks take batches from one queue"),
        (HUB, ["topology.kind=ring"], "needs an edge between hub 0 and worker 2"),
        (GOSSIP, ["topology.kind=one_peer_exponential"], "changes from step to step"),
        (GOSSIP, ["downlink.kind=sign"], "has no use for the section \\[downlink\\]"),
        (HUB, ["downlink.error_feedback=true"], "downlink.error_feedback = true: a hub sends by itself"),
        (GOSSIP, ["compression.error_feedback=true"], "compression.error_feedback = true: DC-gossip sends by itself"),
        (HUB, ["run.on_peer_loss=continue"], "'continue' does not go with algorithm.kind = 'dc_asgd': the part of the"),
        ("configs/methods/motef.toml", ["run.on_peer_loss=continue"], "'motef': it cannot make its state anew"),
        ("configs/methods/lead.toml", ["run.on_peer_loss=continue"], "'lead': it cannot make its state anew"),
        (CHOCO, ["run.on_peer_loss=continue", "topology.kind=hypercube"], "there is no graph for the others"),
        (CHOCO, ["run.on_peer_loss=continue", "compression.allocation=dagc"], "to which their ratios do not"),
        (GOSSIP, ["run.on_peer_loss=continue", "algorithm.share=equal"], "needs algorithm.share = 'by_speed'"),
        (
            HUB,
            ["compression.allocation=dagc"],
            "with algorithm.share = 'by_speed' all ranks take batches from one queue",
        ),
        (
            HUB,
            ["compression.allocation=dagc", "algorithm.share=equal"],
            "the hubs of algorithm.kind = 'dc_asgd' have none, and count every gradient alike",
        ),
        (
            GOSSIP,
            ["compression.allocation=dagc"],
            "set algorithm.share = 'equal', or compression.allocation = 'uniform'",
        ),
        (
            GOSSIP,
            ["compression.allocation=bandwidth", "compression.bandwidths=[1, 2]"],
            "compression.bandwidths has 2 entries for 4 ranks",
        ),
        (
            GOSSIP,
            ["compression.allocation=bandwidth", "run.on_peer_loss=continue"],
            "'continue' does not go with compression.allocation = 'bandwidth'",
        ),
        (PAIRS, ["compression.kind=topk", "compression.ratio=0.1"], "AD-PSGD sends the model itself"),
        (PAIRS, ["run.on_peer_loss=continue"], "does not go with algorithm.kind = 'ad_psgd'"),
        (GOSSIP, ["simulation.gradient_s=0.0"], "simulation.gradient_s = 0.0 must be greater than 0"),
    ],
)
def test_contradictions_are_refused(path, overrides, message):
    with pytest.raises((ConfigError, TopologyError), match=message):
        RunConfig.load(path, overrides).check(4)


def test_threads_cannot_outlive_one_of_them(tmp_path):
    options = [word for option in ("training.epochs=1", "schedule.warmup=0") for word in ("--set", option)]
    arguments = ["train", GOSSIP, *options, "--set", "run.on_peer_loss=continue", "--run-dir", str(tmp_path / "run")]
    outcome = CliRunner().invoke(main, [*arguments, "--loopback", "2"])
    assert outcome.exit_code == 0, outcome.output
    assert "run.on_peer_loss = 'continue' needs ranks that are processes of one machine" in outcome.output


def test_another_number_of_ranks_is_refused(tmp_path):
    simulate(GOSSIP, 3, folder=tmp_path / "run")
    arguments = ["train", "--resume", str(tmp_path / "run"), "--simulate", "4", "--resize"]
    outcome = CliRunner().invoke(main, [*arguments, "--set", "training.epochs=3"])
    assert outcome.exit_code == 2
    assert "--resize: algorithm.kind = 'dc_gossip' cannot go on with another number of ranks" in outcome.output


def test_simulation_keeps_its_infinite_links():
    config = RunConfig.load(HUB)
    assert RunConfig.from_toml(config.to_toml()) == config
    assert dataclasses.asdict(config.simulation.links()) == {
        "latency_s": 0.0,
        "bytes_per_s": float("inf"),
        "node_size": 1,
        "bytes_per_s_of_nodes": (),
    }
