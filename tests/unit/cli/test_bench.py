import json

import pytest
from click.testing import CliRunner

from mpicomp.cli import main


@pytest.mark.parametrize("entries", [1, 1000, 50_000])
def test_json_has_every_figure(entries, tmp_path):
    path = tmp_path / "compress.json"
    arguments = ["bench", "compress", "--entries", entries, "--rounds", "2", "--json", path]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["entries"] == entries and report["rounds"] == 2 and report["copy_ms"] > 0
    rows = {row["name"]: row for row in report["results"]}
    assert len(rows) == len(report["results"]) > 15
    for row in rows.values():
        assert row["ms"] > 0 and row["copies"] > 0
        assert (row["torch_ms"] is None) == (row["torch_copies"] is None)
        assert (row["indices_per_s"] is None) == (row["bits_per_index"] is None) == ("indices" not in row["name"])
    assert rows["top-k, 1.0%"]["torch_ms"] > 0


def test_the_table_names_machine_and_operations():
    result = CliRunner().invoke(main, ["bench", "compress", "--entries", "2000", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    for text in ("2,000 float32", "cpu ", "top-k, 10.0%", "AdaGossip mix", "copies"):
        assert text in result.output


@pytest.mark.parametrize("option", ["--entries", "--rounds"])
def test_a_zero_is_refused(option):
    assert CliRunner().invoke(main, ["bench", "compress", option, "0"]).exit_code == 2


CHOCO = ["--set", "data.kind=synthetic", "--set", "model.hidden=[8]", "--set", "training.batch_size=4"]


def test_steps_of_neighbor_methods_send_as_much_on_any_number_of_ranks(tmp_path):
    path = tmp_path / "step.json"
    sizes = ["--loopback", "3", "--loopback", "5"]
    arguments = ["bench", "step", "configs/methods/choco.toml", *CHOCO, "--blocks", "2", "--block", "2", "--json", path]
    result = CliRunner().invoke(main, [*map(str, arguments), *sizes])
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    three, five = report["results"]
    assert (three["ranks"], five["ranks"]) == (3, 5) and three["nbytes"] == five["nbytes"] > 0
    for row in (three, five):
        assert set(row["parts"]) == {"gradient", "compress", "exchange", "mix"}
        assert all(seconds > 0 for seconds in (*row["parts"].values(), row["alone_seconds"], row["cpu_seconds"]))
        assert row["seconds"] > max(row["parts"].values())
    assert "bytes a rank" in result.output and report["ranks_are"] == "loopback"


@pytest.mark.parametrize(
    ("method", "overrides", "length"),
    [
        ("local_sgd", ["algorithm.period=4"], 8),
        ("diloco", ["algorithm.period=7"], 7),
        ("local_sgd", ["algorithm.period=2", "topology.kind=one_peer_exponential"], 8),
    ],
)
def test_a_block_is_of_whole_periods(method, overrides, length, tmp_path):
    path = tmp_path / "step.json"
    arguments = ["bench", "step", f"configs/methods/{method}.toml", *CHOCO, "--loopback", "4", "--blocks", "2"]
    more = [word for override in overrides for word in ("--set", override)]
    result = CliRunner().invoke(main, [*arguments, *more, "--block", "5", "--json", str(path)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(path.read_text())["results"]
    assert row["steps_a_block"] == length and f"2 blocks of {length} steps" in result.output
    period = int(overrides[0].partition("=")[2])
    once = row["nbytes"] * period
    assert once == pytest.approx(round(once)) and once > 0


def test_a_rank_alone_sends_nothing():
    arguments = ["bench", "step", "configs/methods/choco.toml", *CHOCO, "--blocks", "1", "--loopback", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "0 B" in result.output


def test_asynchronous_methods_have_no_steps_to_time():
    result = CliRunner().invoke(main, ["bench", "step", "configs/methods/dc_gossip.toml", "--loopback", "2"])
    assert result.exit_code != 0
    assert "no common steps" in result.output
