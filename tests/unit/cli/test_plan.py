import json

import pytest
from click.testing import CliRunner

from mpicomp.cli import main
from mpicomp.cli.plan import PAYLOAD, parse_links, verdict
from mpicomp.errors import ConfigError
from mpicomp.exchange.launcher import without_launcher
from mpicomp.run.plan import Prediction

SMALL = ["configs/methods/choco.toml", "--set", "data.kind=synthetic", "--set", "model.hidden=[8]"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    import os

    kept = without_launcher(os.environ)
    for name in set(os.environ) - set(kept):
        monkeypatch.delenv(name)


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_table_choice_and_json(tmp_path):
    path = tmp_path / "plan.json"
    result = plan(*SMALL, "--link", "10kbit", "--latency", "1ms", "--ranks", "6", "--json", path)
    assert result.exit_code == 0, result.output
    for text in ("6 ranks", "links (10kbit, 1ms)", "times DDP's speed", "GMC, 10 %, overlap", "Choice: ", "as fast a"):
        assert text in result.output
    report = json.loads(path.read_text())
    assert report["ranks"] == 6 and report["links"]["latency_s"] == 1e-3
    rows = {row["name"]: row for row in report["predictions"]}
    assert report["choice"] in rows and rows["DDP"]["seconds"] > rows["CHOCO, 10 %"]["seconds"] > 0
    assert report["gradient_s"] > 0 and report["copy_s"] > 0


@pytest.mark.parametrize(
    ("text", "bytes_per_s"), [("100mbit", 12.5e6), ("1gbit", 125e6), ("2.5Gbit", 312.5e6), (" 8 kbit", 1e3)]
)
def test_links_have_bits_a_second_of_which_payload_is_a_part(text, bytes_per_s):
    assert parse_links(text, "0.2ms").bytes_per_s == pytest.approx(PAYLOAD * bytes_per_s)
    assert parse_links(text, "0.2ms").latency_s == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("link", "latency", "said"),
    [
        ("100mb", "1ms", "--link 100mb: unknown unit 'mb'; use bit, kbit, mbit, gbit"),
        ("100", "1ms", "--link 100: unknown unit ''"),
        ("fast", "1ms", "--link fast: must be a number with a unit"),
        ("-1mbit", "1ms", "--link -1mbit: must be a number"),
        ("0mbit", "1ms", "--link 0mbit: must be more than 0"),
        ("1gbit", "1h", "--latency 1h: unknown unit 'h'; use s, ms, us"),
    ],
)
def test_numbers_and_units_that_are_none_are_refused(link, latency, said):
    with pytest.raises(ConfigError) as caught:
        parse_links(link, latency)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "needs links between at least 2 ranks: start it under your launcher"),
        (["--ranks", "4"], "--link 100mbit --latency 1ms --ranks 64"),
        (["--link", "1gbit"], "give the number of ranks, too"),
        (["--link", "1gbit", "--ranks", "1"], "give at least 2"),
        (["--latency", "1ms", "--ranks", "4"], "goes with --link"),
        (["--link", "1gbit", "--ranks", "4", "--set", "topology.kind=ringg"], "topology.kind"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(options, said):
    result = plan(*SMALL, *options)
    assert result.exit_code == ConfigError.exit_code
    assert said in result.output and "Traceback" not in result.output


def test_a_launcher_of_one_rank_has_no_links(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    assert "needs links between at least 2 ranks" in plan(*SMALL).output


def row(name, seconds, is_dense=False, period=1):
    return Prediction(name, seconds, seconds / 2, 1.0, is_dense, period)


def test_the_verdict_says_where_not_to_compress():
    rows = [row("DDP", 1.0, is_dense=True), row("D-PSGD", 0.8, is_dense=True), row("CHOCO", 0.9)]
    assert verdict(rows[::2])[0].startswith("Do not compress here: no step is much faster")
    assert verdict(rows)[0].startswith("Do not compress here: D-PSGD has 1.25 times")
    assert verdict([rows[0], row("CHOCO", 0.1)])[0] == "Choice: CHOCO, 10 times as fast a step as DDP's."


def test_the_verdict_names_a_method_that_sends_rarely_where_that_is_much_faster():
    rows = [row("DDP", 1.0, is_dense=True), row("CHOCO", 0.2)]
    lines = verdict([*rows, row("local", 0.1, period=8)])
    assert lines[0].startswith("Choice: CHOCO, 5 times")
    assert lines[1] == "With an exchange only once in many steps: local, 10 times."
    assert len(verdict([*rows, row("local", 0.19, period=8)])) == len(verdict(rows)) == 2
