"""Runs in simulated time whose messages are lost, and whose ranks leave and come back."""

from functools import partial

import pytest
from support.runs import assert_same_checkpoint, records

from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.config.config import RunConfig
from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

RUN = """
[data]
kind = "digits"
[compression]
kind = "topk"
ratio = 0.2
[algorithm]
kind = "local_sgd"
inner = "deep_squeeze"
period = 2
gamma = 0.05
[optimizer]
lr = 0.1
momentum = 0.9
[run]
log_every = 2
[checkpoint]
every_steps = 2
keep_last = 9
[training]
steps = 8
[simulation]
spread = "uniform"
loss = 0.3
churn = "trace.csv"
"""
# Rank 3 returns after a checkpoint in the middle, and rank 0 has made no step before one.
TRACE = "rank,leaves,returns\n3,2,5\n0,0,3\n"
ALONE = ["algorithm.inner=", "algorithm.period="]


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "trace.csv").write_text(TRACE)
    return lambda *overrides: RunConfig.load(tmp_path / "run.toml", overrides)


def simulate(config, path, checkpoint=None):
    """Return the result of a run, and its checkpoints by step."""
    folder = RunFolder(path) if path.exists() else RunFolder.create(path)
    folder.save_config(config)
    go_on = partial(train, config, folder=folder, checkpoint=checkpoint)
    result = run(4, go_on, simulated=config.simulation.links())[0]
    return result, {each.manifest.step: each for each in Checkpoints(folder.checkpoints_path).all()}


def test_a_run_that_continues_loses_the_same_messages_and_ranks(load, tmp_path):
    result, whole = simulate(load(), tmp_path / "whole")
    again, continued = simulate(load(), tmp_path / "continued", whole[4])
    assert_same_checkpoint(continued[8], whole[8])
    assert records(tmp_path / "continued") == records(tmp_path / "whole")[2:]
    assert again.seconds == pytest.approx(result.seconds)

    # A rank that is away changes nothing but the count of its steps.
    before, after = whole[2].read(3), whole[4].read(3)
    changed = {path for path in before if not path.startswith(("meter/", "random/")) and _differs(before, after, path)}
    assert changed == {"algorithm/step", "algorithm/inner/step", "exchange/steps"}
    # In the first mixing rank 0 is away from the ring, and its neighbors have one neighbor less.
    sent = [whole[2].read(rank)["exchange/bytes_sent"] for rank in range(4)]
    assert sent[0] == 0 and [round(nbytes / sent[2], 1) for nbytes in sent[1:]] == [0.5, 1.0, 0.5]

    lossless, _ = simulate(load("simulation.loss=0.0", "simulation.spread=fixed"), tmp_path / "lossless")
    assert lossless.seconds == pytest.approx(8.0)
    assert lossless.consensus_distance != result.consensus_distance


def _differs(one, other, path):
    return repr(one[path]) != repr(other[path])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.inner=choco"], r"simulation.churn = 'trace.csv' does not go with algorithm.inner = 'choco'"),
        (
            ["algorithm.kind=sgp", *ALONE, "simulation.churn="],
            r"simulation.loss = 0.3 does not go with .*kind = 'sgp', which",
        ),
        (
            ["algorithm.kind=dc_gossip", *ALONE],
            r"algorithm.kind = 'dc_gossip', which needs every .* 'dpsgd', 'deep_squeeze'",
        ),
        (["topology.kind=exponential"], r"topology.kind = 'exponential': without some ranks, a directed graph no"),
        (["topology.level=node"], r"does not go with topology.level = 'node'"),
        (["simulation.churn=none.csv"], r"'none.csv': cannot be read"),
        (["simulation.loss=1.0"], r"simulation.loss = 1.0 must be less than 1"),
    ],
)
def test_what_needs_every_message_is_refused(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides).check(4, ((0, 1), (2, 3)) if "topology.level=node" in overrides else None)


def test_what_goes_wrong_needs_simulated_time(load, tmp_path):
    with pytest.raises(ConfigError, match=r"simulation.churn = 'trace.csv': .* --simulate, or leave the key out"):
        run(4, partial(train, load(), folder=RunFolder.create(tmp_path / "real")))


def test_losses_belong_to_a_run_and_links_do_not(load):
    load("simulation.latency_s=0.1").check_continues(load())
    with pytest.raises(ConfigError, match=r"simulation.loss was 0.3 and is now 0.0"):
        load("simulation.loss=0.0").check_continues(load())
