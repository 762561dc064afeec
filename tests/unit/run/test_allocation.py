"""Runs whose ranks send by what they hold."""

import dataclasses

import pytest
import torch
from click.testing import CliRunner
from support.runs import assert_same_checkpoint, records

from mpicomp.algorithms import EFSGD, Choco, LocalSGD
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.cli import main
from mpicomp.compression import ByRank, HardThreshold, PerTensor, TopK
from mpicomp.compression.wrap.allocation import dagc_ratios, dagc_thresholds
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.loopback.network import Links
from mpicomp.run.loop import train
from mpicomp.run.setup import header, set_up, with_bandwidths

RUN = """
[data]
kind = "digits"
partition = "volumes"
skew = 20.0
alpha = 1.0
[compression]
kind = "topk"
ratio = 0.05
allocation = "dagc"
[algorithm]
kind = "choco"
gamma = 0.1
[optimizer]
lr = 0.1
[training]
steps = 20
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return lambda *overrides: RunConfig.load(path, overrides)


def volumes_of(config, size):
    dataset = config.data.load()
    return [len(part) for part in config.data.split(dataset.train_labels, size, config.run.seed)]


@pytest.mark.parametrize(
    ("overrides", "make"),
    [
        ([], lambda v: map(TopK, dagc_ratios(v, 0.05))),
        (
            ["compression.per_tensor=true", "compression.dense_1d=true"],
            lambda v: (PerTensor(TopK(ratio), dense_1d=True) for ratio in dagc_ratios(v, 0.05)),
        ),
        (
            ["compression.kind=threshold", "compression.ratio=", "compression.threshold=0.01"],
            lambda v: map(HardThreshold, dagc_thresholds(v, 0.01)),
        ),
    ],
)
def test_the_compressor_follows_the_samples_of_the_ranks(load, overrides, make):
    config = load(*overrides)
    volumes = volumes_of(config, 4)
    assert volumes[0] > 10 * volumes[3]
    setups = run(4, lambda world: set_up(config, world))
    assert [setup.algorithm.compressor for setup in setups] == [ByRank(tuple(make(volumes)))] * 4
    uniform = run(4, lambda world: set_up(load(*overrides, "compression.allocation=uniform"), world))
    assert not isinstance(uniform[0].algorithm.compressor, ByRank)


def test_an_algorithm_inside_another_is_given_the_ratios(load):
    config = load("algorithm.kind=local_sgd", "algorithm.inner=choco", "training.steps=40")
    (setup, *_) = run(4, lambda world: set_up(config, world))
    ratios = ByRank(tuple(map(TopK, dagc_ratios(volumes_of(config, 4), 0.05))))
    assert setup.algorithm == LocalSGD(4, Choco(0.1, ratios))
    assert any("dagc: ratios of the ranks" in line for line in header(config, setup, run(1, lambda w: w)[0], 0))
    (result, *others) = run(4, lambda world: train(config, world, None, None))
    assert all(other == result for other in others)


def test_the_header_shows_what_each_rank_has(load):
    def lines(world, config):
        return header(config, set_up(config, world), world, 0)

    (shown, *_) = run(4, lines, load())
    ratios = dagc_ratios(volumes_of(load(), 4), 0.05)
    listed = ", ".join(f"{ratio:.3g}" for ratio in ratios)
    assert f"dagc: ratios of the ranks: {min(ratios):.3g} to {max(ratios):.3g} ({listed})" in shown
    (plain, *_) = run(4, lines, load("compression.allocation=uniform"))
    assert not any("ratios" in line for line in plain)


@pytest.mark.parametrize("weights", ["equal", "volume"])
def test_an_algorithm_with_volumes_is_told_them(load, weights):
    config = load("algorithm.kind=ef_sgd", "algorithm.gamma=", f"algorithm.weights={weights}")
    (setup, *_) = run(4, lambda world: set_up(config, world))
    volumes = tuple(volumes_of(config, 4))
    assert setup.algorithm == EFSGD(ByRank(tuple(map(TopK, dagc_ratios(volumes, 0.05)))), weights, volumes)
    given = load("algorithm.kind=ef_sgd", "algorithm.gamma=", "algorithm.volumes=[1, 2, 3, 4]")
    (setup, *_) = run(4, lambda world: set_up(given, world))
    assert setup.algorithm.volumes == (1, 2, 3, 4)


def test_asynchronous_gossip_takes_it_with_equal_shares(load):
    config = load("algorithm.kind=dc_gossip", "algorithm.share=equal", "training.steps=60", "compression.ratio=0.2")
    (result, *others) = run(4, lambda world: train(config, world), simulated=Links())
    assert all(other == result for other in others)
    assert result.test_accuracy > 0.5


def test_weights_by_volume_and_ratios_by_volume_learn(load):
    config = load(
        *("algorithm.kind=ef_sgd", "algorithm.gamma=", "algorithm.weights=volume", "training.steps=100"),
        "compression.per_tensor=true",
    )
    (result, *others) = run(4, lambda world: train(config, world))
    assert all(dataclasses.replace(other, seconds=result.seconds) == result for other in others)
    assert result.test_accuracy > 0.7


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["compression.kind=randk", "compression.shared=false"],
        ["algorithm.kind=ef_sgd", "algorithm.gamma=", "algorithm.weights=volume", "compression.per_tensor=true"],
    ],
)
def test_a_run_that_goes_on_is_the_run_that_did_not_stop(load, tmp_path, overrides):
    options = ["checkpoint.every_steps=8", "checkpoint.keep_last=0", "run.log_every=1", *overrides]
    words = [word for option in options for word in ("--set", option)]
    load()
    folders = [tmp_path / name for name in ("whole", "again")]
    for folder in folders:
        command = ["train", str(tmp_path / "run.toml"), *words, "--loopback", "3", "--run-dir", str(folder)]
        outcome = CliRunner().invoke(main, command)
        assert outcome.exit_code == 0, outcome.output
    whole, again = folders
    first = sorted((again / "checkpoints").glob("step_*"))[0]
    outcome = CliRunner().invoke(main, ["train", "--resume", str(first), "--loopback", "3"])
    assert outcome.exit_code == 0, outcome.output
    assert "Going on after step 8" in outcome.output
    assert_same_checkpoint(*(Checkpoints(folder / "checkpoints").latest() for folder in folders))
    assert records(whole) == records(again)
    refused = CliRunner().invoke(
        main, ["train", "--resume", str(first), "--loopback", "3", "--set", "compression.allocation=uniform"]
    )
    assert refused.exit_code == 2
    assert "compression.allocation was 'dagc' and is now 'uniform'" in refused.output


LINKS = "simulation.bytes_per_s=[1e6, 1e6, 4e6, 4e6, 4e6, 4e6]"
BANDWIDTH = ["compression.allocation=bandwidth", "compression.ratio=0.02", LINKS, "simulation.latency_s=0.01"]
BANDWIDTH += ["training.steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=0"]


def simulate(*words, overrides):
    options = [word for override in overrides for word in ("--set", override)]
    outcome = CliRunner().invoke(main, ["train", *map(str, words), *options, "--simulate", "6"])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_ratios_follow_the_measured_links_and_a_restart_keeps_them(load, tmp_path):
    load()
    own, whole, again = (tmp_path / name for name in ("run.toml", "whole", "again"))
    for folder in (whole, again):
        assert "bandwidth: ratios of the ranks: 0.02 to 0.08" in simulate(own, "--run-dir", folder, overrides=BANDWIDTH)
    stored = RunConfig.load(again / "config.toml")
    # Ranks 0 and 1 are slow, and what their neighbors 5 and 2 send to them is, too. A port has two messages.
    assert stored.compression.bandwidths == [5e5, 5e5, 5e5, 2e6, 2e6, 5e5]
    equal_links = "simulation.bytes_per_s=4e6"
    first = min((again / "checkpoints").glob("step_*"))
    assert "Going on after step 2" in simulate("--resume", first, overrides=[equal_links])
    assert RunConfig.load(again / "config.toml").compression == stored.compression
    checkpoint, uninterrupted = (Checkpoints(folder / "checkpoints").latest() for folder in (again, whole))
    for rank in (0, 3):
        own_leaves, leaves = checkpoint.read(rank), uninterrupted.read(rank)
        assert own_leaves["exchange/bytes_sent"] == leaves["exchange/bytes_sent"]
        tensors = [
            path for path, leaf in leaves.items() if path.startswith(("model/", "algorithm/")) and torch.is_tensor(leaf)
        ]
        assert len(tensors) == 3 and all(torch.equal(own_leaves[path], leaves[path]) for path in tensors)
    # --resume auto reads the first configuration, without bandwidths: they are those of the checkpoint.
    config = load(*BANDWIDTH, equal_links)
    config.check_continues(stored)
    found = run(6, lambda world: with_bandwidths(config, world, None, checkpoint), simulated=config.simulation.links())
    assert [each.compression for each in found] == [stored.compression] * 6
    with pytest.raises(ConfigError, match=r"compression.bandwidths was \[500000.0, .* and is now \[1.0, "):
        load(*BANDWIDTH, "compression.bandwidths=[1, 1, 1, 1, 1, 1]").check_continues(stored)


DIRECTED = ["topology.kind=directed_ring", "topology.weights=push", "algorithm.kind=sgp"]


@pytest.mark.parametrize(
    ("overrides", "links", "message"),
    [
        ([], None, "ranks that are threads of one process have no links to measure: give compression.bandwidths"),
        ([], Links(), r"its link no limit. Give compression.bandwidths \(in simulated time, simulation.bytes_per_s\)"),
        (DIRECTED, Links(0, 1e6), "a directed graph .* cannot be measured: give compression.bandwidths"),
    ],
)
def test_links_that_cannot_be_measured_are_refused(load, overrides, links, message):
    config = load("compression.allocation=bandwidth", *overrides)
    with pytest.raises(ConfigError, match=message):
        run(3, lambda world: with_bandwidths(config, world), simulated=links)
