"""The timeline: valid, complete, nested, and of one mind with the metrics."""

import json
import time
from collections import defaultdict

import pytest
from click.testing import CliRunner

from mpicomp.cli import main
from mpicomp.exchange import loopback
from mpicomp.exchange.loopback.network import Links
from mpicomp.run.folder import RunFolder
from mpicomp.run.setup import Setup
from mpicomp.run.trace import LIMIT, compare_clocks, merge

NAMES = {
    "gradient": {"gradient", "update"},
    "compress": {"compress", "compress_difference", "accumulate", "add", "compress_sum", "select", "encode", "pack"},
    "exchange": {"send", "wait", "all_reduce", "meet", "put", "receive", "pack", "unpack"},
    "mix": {"mix", "pack", "unpack"},
    "wait": {"idle"},
    "none": {"step", "record", "evaluation", "checkpoint"},
}
SHORT = ["--set", "training.epochs=1", "--set", "run.log_every=5", "--set", "schedule.warmup=0"]


def mpicomp(*arguments):
    outcome = CliRunner().invoke(main, ["train", *map(str, arguments)])
    assert outcome.exit_code in (0, 75), outcome.output
    return outcome


def events(folder, file="trace.json"):
    """Return the events of each rank by begin, outer ones first."""
    document = json.loads((folder / "trace" / file).read_text())
    by_rank = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            by_rank[event["pid"]].append(event)
    return {rank: sorted(found, key=lambda e: (e["ts"], -e["dur"])) for rank, found in by_rank.items()}


def seconds(found):
    """Return the seconds by category, each instant for the innermost event that has one; events must nest."""
    totals, around = defaultdict(float), []
    for event in found:
        begin, end = event["ts"], event["ts"] + event["dur"]
        while around and around[-1]["ts"] + around[-1]["dur"] <= begin + 0.002:
            around.pop()
        if around:
            assert end <= around[-1]["ts"] + around[-1]["dur"] + 0.002, (event, around[-1])
            totals[around[-1]["cat"]] -= event["dur"] / 1e6
        totals[event["cat"]] += event["dur"] / 1e6
        around.append(event)
    return totals


@pytest.mark.parametrize("method", ["choco", "gmc", "ssgd", "dgc"])
def test_a_timeline_agrees_with_the_metrics(tmp_path, method):
    more = ["--set", "algorithm.overlap=true"] if method == "gmc" else []
    mpicomp(
        f"configs/methods/{method}.toml",
        *SHORT,
        *more,
        "--loopback",
        3,
        "--run-dir",
        tmp_path,
        "--trace",
        "--trace-steps",
        10**6,
    )
    found = events(tmp_path)
    assert set(found) == {0, 1, 2}
    records = RunFolder(tmp_path).records()
    for part in ("gradient", "compress", "exchange", "mix"):
        shown = sum(seconds(rank)[part] for rank in found.values()) / len(found)
        measured = sum(record["seconds"][part] for record in records)
        assert shown == pytest.approx(measured, rel=0.05, abs=0.01), part
    for rank in found.values():
        assert all(event["name"] in NAMES[event["cat"]] for event in rank), {(e["cat"], e["name"]) for e in rank}
        names = [event["name"] for event in rank]
        assert names.count("step") == records[-1]["step"]
        assert names.count("gradient") == records[-1]["step"]
        assert {"evaluation", "checkpoint", "record", "meet", "mix", "update"} <= set(names)
    hidden = sum(record["seconds"]["exchange_hidden"] for record in records)
    assert hidden < 0.01 if method in ("ssgd", "dgc") else hidden > 0


def test_a_timeline_is_of_the_first_steps_and_bounded(tmp_path):
    mpicomp("configs/methods/choco.toml", *SHORT, "--loopback", 2, "--run-dir", tmp_path, "--trace", "--trace-steps", 3)
    for rank in (0, 1):
        (found,) = events(tmp_path, f"rank-000{rank}.json").values()
        assert [event["name"] for event in found].count("step") == 3
        assert found == events(tmp_path)[rank]
        assert len(found) < LIMIT


def test_a_run_that_stops_and_goes_on_has_a_timeline_of_each_start(tmp_path):
    run = ["--loopback", 2, "--trace"]
    assert (
        mpicomp("configs/methods/choco.toml", *SHORT, *run, "--run-dir", tmp_path, "--time-limit", "0s").exit_code == 75
    )
    first = events(tmp_path)
    assert set(first) == {0, 1}
    (tmp_path / "trace" / "rank-0007.json").write_text("of more ranks")
    assert mpicomp("--resume", tmp_path, *run).exit_code == 0
    again = events(tmp_path)
    assert set(again) == {0, 1}
    assert len(again[0]) > len(first[0])


@pytest.mark.parametrize("how", ["--loopback", "--simulate"])
@pytest.mark.parametrize("method", ["dc_gossip", "dc_asgd", "ad_psgd"])
def test_asynchronous_methods_too(tmp_path, how, method):
    mpicomp(f"configs/methods/{method}.toml", *SHORT, how, 4, "--run-dir", tmp_path, "--trace", "--trace-steps", 5)
    found = events(tmp_path)
    assert set(found) == {0, 1, 2, 3}
    for number, rank in found.items():
        seconds(rank)
        assert all(event["name"] in NAMES[event["cat"]] for event in rank), {(e["cat"], e["name"]) for e in rank}
        is_hub = method == "dc_asgd" and number == 0
        assert [event["name"] for event in rank].count("gradient") == (0 if is_hub else 5)
        assert {"receive"} <= {event["name"] for event in rank}


def test_a_timeline_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "trace").touch()  # where the folder should be
    outcome = mpicomp("configs/methods/choco.toml", *SHORT, "--loopback", 2, "--run-dir", tmp_path, "--trace")
    assert (tmp_path / "result.json").exists()
    assert "mpicomp: warning: the timeline of rank 1 could not be written" in outcome.output


def test_no_timeline_unless_it_is_asked_for(tmp_path):
    mpicomp("configs/methods/choco.toml", *SHORT, "--loopback", 2, "--run-dir", tmp_path)
    assert not (tmp_path / "trace").exists()
    outcome = CliRunner().invoke(main, ["train", "configs/methods/choco.toml", "--trace-steps", "3"])
    assert "--trace-steps goes with --trace" in outcome.output


class Elsewhere:
    """A rank of the loopback whose clock is ahead."""

    def __init__(self, world, ahead_s, same_host):
        self._world = world
        self._ahead_s = ahead_s if world.rank else 0.0
        self.host = f"host {0 if same_host else world.rank}"

    def __getattr__(self, name):
        return getattr(self._world, name)

    def now(self):
        return self._world.now() + self._ahead_s


@pytest.mark.parametrize("ahead_s", [-1234.5, 0.0, 2e-3, 77.7])
@pytest.mark.parametrize("same_host", [False, True])
def test_clocks_are_compared(ahead_s, same_host):
    first, *others = loopback.run(3, lambda world: compare_clocks(Elsewhere(world, ahead_s, same_host)))
    assert first == (0.0, 0.0) or not same_host
    for offset, accuracy in others:
        assert abs(offset - ahead_s) <= accuracy + 1e-9 or (same_host and abs(ahead_s) < 0.1)
        assert 0 <= accuracy < 0.1
    if same_host and ahead_s == 0:
        assert set(others) == {(0.0, 0.0)}


def test_simulated_clocks_are_one():
    assert loopback.run(3, compare_clocks, simulated=Links()) == [(0.0, 0.0)] * 3


def test_files_of_ranks_that_have_no_events_are_merged(tmp_path):
    for rank in range(2):
        document = {"traceEvents": [], "otherData": {"rank": rank, "accuracy_s": 0.5}}
        (tmp_path / f"rank-{rank:04}.json").write_text(json.dumps(document))
    merge(tmp_path)
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"accuracy_s": {"0": 0.5, "1": 0.5}}


@pytest.mark.parametrize("config", ["dpsgd", "ad_psgd"])
def test_making_batches_counts_as_time_of_the_gradient(config, monkeypatch, tmp_path):
    batch, calls = Setup.batch, []

    def slow(self, *place):
        time.sleep(0.02)
        calls.append(place)
        return batch(self, *place)

    monkeypatch.setattr(Setup, "batch", slow)
    mpicomp(f"configs/methods/{config}.toml", *SHORT, "--loopback", "2", "--run-dir", tmp_path / "run")
    records = RunFolder(tmp_path / "run").records()
    assert sum(record["seconds"]["gradient"] for record in records) >= 0.02 * len(calls) / 2
