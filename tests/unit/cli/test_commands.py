"""``mpicomp train``, ``evaluate`` and ``plot``, on two ranks of the loopback."""

import json

import pytest
from click.testing import CliRunner

from mpicomp.cli import main

CONFIG = """
[model]
kind = "logistic"
[algorithm]
kind = "dpsgd"
[optimizer]
lr = 0.1
[training]
steps = 12
batch_size = 8
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(CONFIG)
    return "small.toml"


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_run_leaves_its_folder(config, tmp_path):
    result = run("train", config, "--loopback", 2, "--run-dir", "out", "--set", "run.seed=3")
    assert result.exit_code == 0, result.output
    assert "Results: out" in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "model.h5",
        "ranks.json",
        "result.json",
    ]
    stored = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (stored["ranks"], stored["steps"], len(stored["test_accuracy_local"])) == (2, 12, 2)
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 12]
    assert "seed = 3" in (tmp_path / "out" / "config.toml").read_text()


def test_a_run_can_be_repeated_from_its_own_configuration(config, tmp_path):
    for source, out in ((config, "one"), ("one/config.toml", "two")):
        assert run("train", source, "--loopback", 2, "--run-dir", out).exit_code == 0
    assert (tmp_path / "one/config.toml").read_text() == (tmp_path / "two/config.toml").read_text()
    losses = [json.loads((tmp_path / out / "result.json").read_text())["train_loss"] for out in ("one", "two")]
    assert losses[0] == losses[1]


def test_a_run_without_a_folder_gets_one(config, tmp_path):
    assert run("train", config, "--loopback", 1, "--set", "training.steps=1").exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("small-2")


def test_evaluate_finds_the_accuracy_of_the_run(config, tmp_path):
    run("train", config, "--loopback", 2, "--run-dir", "out")
    (tmp_path / "it's here").mkdir()
    result = run("evaluate", "out", "--data-path", "it's here")
    assert result.exit_code == 0, result.output
    accuracy = json.loads((tmp_path / "out" / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in result.output


def test_plot_makes_a_picture(config, tmp_path):
    run("train", config, "--loopback", 2, "--run-dir", "out")
    assert run("plot", "out").output == "Picture: out/plot.png\n"
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", "out", "out", "--out", "both.png").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train"], 2, "give a configuration file, or a run to go on with"),
        (["train", "none.toml", "--loopback", "2"], 2, "mpicomp: error: none.toml: there is no such file"),
        (["train", "small.toml", "--loopback", "0"], 2, "'--loopback': 0 is not in the range x>=1"),
        (["train", "small.toml", "--loopbak", "2"], 2, "No such option"),
        (
            ["train", "small.toml", "--loopback", "2", "--set", "optimizer.learning_rate=1"],
            2,
            "small.toml: optimizer.learning_rate is unknown. Did you mean 'optimizer.lr'?",
        ),
        (["evaluate", "none"], 2, "mpicomp: error: none is not the folder of a run"),
        (["plot"], 2, "Missing argument 'RUN...'"),
        (["plot", "none"], 2, "mpicomp: error: none is not the folder of a run"),
    ],
)
def test_mistakes_on_the_command_line(config, arguments, code, message):
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("ranks", "override", "code", "message"),
    [
        (6, "topology.kind=hypercube", 2, "topology.kind = 'hypercube' needs a power of two"),
        (2, "algorithm.kind=sgd", 2, "algorithm.kind = 'sgd' is for one rank"),
        (2, "data.kind=cifar10", 3, "data.kind = 'cifar10' needs the file cifar10.h5"),
        (2, "optimizer.lr=1e38", 5, "loss is"),
    ],
)
def test_a_run_that_cannot_be(config, tmp_path, ranks, override, code, message, capfd, monkeypatch):
    monkeypatch.delenv("MPICOMP_DATA", raising=False)
    result = run("train", config, "--loopback", ranks, "--run-dir", "out", "--set", override)
    assert result.exit_code == code
    errors = result.stderr + capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_the_folder_of_an_earlier_run_is_kept(config, tmp_path, capfd):
    run("train", config, "--loopback", 2, "--run-dir", "out")
    before = (tmp_path / "out" / "result.json").read_bytes()
    result = run("train", config, "--loopback", 2, "--run-dir", "out")
    assert result.exit_code == 2
    assert "the run folder out already holds a run (config.toml)" in result.stderr + capfd.readouterr().err
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_picture_files_that_cannot_be_written(config):
    run("train", config, "--loopback", 1, "--run-dir", "out", "--set", "training.steps=1")
    assert "--out none/x.png cannot be written" in run("plot", "out", "--out", "none/x.png").stderr
    assert "--out x.foo cannot be written" in run("plot", "out", "--out", "x.foo").stderr


def test_ranks_as_threads_are_refused_under_a_launcher_of_several(config, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    result = run("train", config, "--loopback", 2)
    assert result.exit_code == 2 and "has started this 2 times: start it once, without one" in result.stderr


def test_a_period_longer_than_the_run_is_warned_of(config):
    options = ("--set", "algorithm.kind=local_sgd", "--set", "algorithm.period=50")
    result = run("train", config, "--loopback", 2, *options)
    assert "mpicomp: warning: algorithm.period = 50: the run ends after 12 steps" in result.output


def test_data_that_are_not_there_are_refused_by_evaluate(config):
    run("train", config, "--loopback", 2, "--run-dir", "out")
    result = run("evaluate", "out", "--data-path", "nowhere")
    assert result.exit_code == 2 and "nowhere" in result.output
