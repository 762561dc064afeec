"""``mpicomp tune``: short runs of two ranks, and what is said of them."""

import math
import os
import re

import pytest
from click.testing import CliRunner

from mpicomp.cli import main
from mpicomp.config.config import RunConfig
from mpicomp.errors import DivergenceError, MpicompError
from mpicomp.exchange.launcher import without_launcher
from mpicomp.run import tuning as module
from mpicomp.run.search import Axis
from mpicomp.run.trial import Trial, run_trial

CONFIG = """
[model]
kind = "logistic"
[compression]
kind = "topk"
ratio = 0.1
[algorithm]
kind = "choco"
gamma = 0.2
[optimizer]
lr = 0.1
[training]
epochs = 100
batch_size = 64
"""
RANKS = ("--loopback", 2)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - without_launcher(os.environ).keys():
        monkeypatch.delenv(name)
    (tmp_path / "small.toml").write_text(CONFIG)
    return "small.toml"


@pytest.fixture
def trials(monkeypatch):
    """The configurations that were run; loss and consensus distance are least at gamma 0.4, and 1.2 diverges."""
    configs = []

    def train(text, size, simulate):
        configs.append(config := RunConfig.from_toml(text))
        gamma = config.algorithm.gamma
        if gamma != "auto" and gamma * config.optimizer.lr / 0.1 > 1.2:
            return None
        far = 0.5 if gamma == "auto" else abs(math.log(gamma / 0.4))
        result = {"test_loss": 1 + far, "test_accuracy": 0.9, "consensus_distance": 0.01 + far, "steps": 200}
        return Trial(result, [{"diagnostics": {"gamma": 0.123} if gamma == "auto" else {}}])

    monkeypatch.setattr(module, "run_trial", train)
    return configs


def tune(*arguments):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_short_runs_on_digits_find_a_value_that_is_written(config, tmp_path):
    options = ("--search", "algorithm.gamma=1", "--points", 1, "--epochs", 2, "--set", "run.seed=3")
    result = tune(config, *RANKS, *options, "--write", "tuned.toml")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == (
        "choco, ranks: 2, runs: at most 1 and auto, epochs of a run: 2, judged by 143 training samples held out"
    )
    assert re.fullmatch(r" +1\.0 +0\.\d+ +\d\d\.\d\d% +\S+ +\d:\d\d", lines[2])
    assert re.match(r" +auto .*  0\.\d+ at the end, after 20 steps, too few to settle", lines[3])
    found = RunConfig.load(tmp_path / "tuned.toml")
    assert found.algorithm.gamma == 1.0
    assert f"Best: algorithm.gamma = {found.algorithm.gamma} (loss" in result.output
    assert (found.run.seed, found.training.epochs, found.data.validation) == (3, 100, 0)
    assert "The runs had 20 steps each" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.toml", "tuned.toml"]


def test_a_run_that_diverges_is_a_line_and_the_search_goes_on(config, trials):
    result = tune(config, *RANKS, "--points", 6, "--epochs", 1)
    assert result.exit_code == 0, result.output
    gammas = [trial.algorithm.gamma for trial in trials]
    assert gammas == [0.2, 0.4, 0.8, 0.566, 0.283, 0.476, "auto"]
    assert {(trial.training.epochs, trial.data.validation) for trial in trials} == {(1, 143)}
    assert "Best: algorithm.gamma = 0.4 (loss 1, accuracy 90.00%)." in result.output
    assert 'or take gamma = "auto"' in result.output and "edge" not in result.output
    shown = result.output.split("\n\n")[1].splitlines()
    assert [row.split()[0] for row in shown[1:]] == ["0.2", "0.283", "0.4", "0.476", "0.566", "0.8", "auto"]
    assert shown[3].endswith("########## best") and shown[1].endswith(" #################")
    result = tune(config, *RANKS, "--points", 3, "--search", "algorithm.gamma=1")
    assert re.search(r"2\.0  diverged\n", result.output) and "It lies at the edge" in result.output


@pytest.mark.parametrize(("steps", "chosen"), [(200, "auto"), (100, 0.2)], ids=["long_enough", "too_short"])
def test_auto_is_written_where_it_was_the_best(config, monkeypatch, tmp_path, steps, chosen):
    def train(text, size, simulate):
        gamma = RunConfig.from_toml(text).algorithm.gamma
        loss = 0.9 if gamma == "auto" else 1 + abs(math.log(gamma / 0.2))
        result = {"test_loss": loss, "test_accuracy": 0.9, "consensus_distance": 0.01, "steps": steps}
        return Trial(result, [{"diagnostics": {"gamma": 0.123} if gamma == "auto" else {}}])

    monkeypatch.setattr(module, "run_trial", train)
    result = tune(config, *RANKS, "--points", 3, "--epochs", 1, "--write", "tuned.toml")
    assert f"Best: algorithm.gamma = {chosen} (loss" in result.output
    assert RunConfig.load(tmp_path / "tuned.toml").algorithm.gamma == chosen
    assert result.output.count(" best\n") == 1
    assert ("A short run tends" in result.output) == (chosen != "auto")


def test_several_keys_are_searched_together_and_auto_has_the_best_of_the_others(config, trials):
    options = ("--search", "algorithm.gamma=0.4", "--search", "optimizer.lr", "--points", 5)
    result = tune(config, *RANKS, *options)
    assert result.exit_code == 0, result.output
    assert [trial.optimizer.lr for trial in trials] == [0.1, 0.1, 0.1, 0.2, 0.05, 0.1]
    assert trials[-1].algorithm.gamma == "auto"
    assert "algorithm.gamma  optimizer.lr        loss  accuracy  consensus" in result.output


def test_without_gamma_the_learning_rate_is_searched(config, trials, tmp_path):
    (tmp_path / "ssgd.toml").write_text(CONFIG.replace("choco", "ssgd").replace("gamma = 0.2\n", ""))
    (axis,) = module.axes_of(tmp_path / "ssgd.toml", ["compression.kind=identity", "compression.ratio="], (), 2.0)
    assert axis == Axis("optimizer.lr", 0.1, 2.0)
    (axis,) = module.axes_of(tmp_path / config, ["algorithm.gamma=auto"], (), 2.0)
    assert axis == Axis("algorithm.gamma", module.GAMMA_START, 2.0)


def test_a_key_that_the_file_lacks_may_be_searched_for(config, trials, tmp_path):
    (tmp_path / "lacks.toml").write_text(CONFIG.replace("lr = 0.1\n", ""))
    result = tune("lacks.toml", *RANKS, "--search", "optimizer.lr=0.2", "--points", 1)
    assert result.exit_code == 0 and trials[0].optimizer.lr == 0.2


def test_if_all_runs_diverge_the_remedy_is_named(config, trials, monkeypatch):
    options = ("--search", "algorithm.gamma=50", "--points", 3)
    result = tune(config, *RANKS, *options)
    assert result.exit_code == 0 and "Best: algorithm.gamma = auto (loss 1.5" in result.output
    monkeypatch.setattr(module, "run_trial", lambda *_: None)
    result = tune(config, *RANKS, *options)
    assert result.exit_code == DivergenceError.exit_code
    assert "none of 3 runs has come to a loss: begin lower, --search algorithm.gamma=2.5\n" in result.stderr


def test_a_trial_that_fails_is_a_line_unless_it_is_the_first(config, monkeypatch):
    def train(text, size, simulate):
        if RunConfig.from_toml(text).algorithm.gamma != 0.2:
            raise MpicompError("a trial ended with exit code 9: killed")
        result = {"test_loss": 1.0, "test_accuracy": 0.9, "consensus_distance": 0.01, "steps": 200}
        return Trial(result, [{"diagnostics": {}}])

    monkeypatch.setattr(module, "run_trial", train)
    result = tune(config, *RANKS, "--points", 2, "--set", "run.seed=1")
    assert re.search(r"0\.4  failed: a trial ended with exit code 9: killed\n", result.output)
    assert re.search(r"auto  failed: a trial ended", result.output) and "Best: algorithm.gamma = 0.2" in result.output
    result = tune(config, *RANKS, "--search", "algorithm.gamma=0.3")
    assert result.exit_code == 1 and "a trial ended with exit code 9" in result.stderr


def test_nodes_are_those_of_the_graph(config, trials):
    options = ("--set", "topology.kind=hypercube", "--set", "topology.level=node", "--set", "topology.node_size=3")
    assert tune(config, "--loopback", 12, *options, "--points", 1).exit_code == 0


def test_values_that_cannot_be_are_lines(config, trials):
    result = tune(config, *RANKS, "--search", "compression.ratio=0.6", "--points", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"1\.2  not possible: .*ratio = 1\.2", result.output)


def test_of_the_same_losses_the_run_whose_ranks_are_closer_together_is_better():
    close, far = module.Row(("1",), 0.5, distance=0.1), module.Row(("2",), 0.5, distance=0.2)
    assert close.score > far.score > module.Row(("3",), math.inf).score == -math.inf
    assert module.Row(("4",), 0.48, distance=0.2).score > close.score  # a loss that is clearly less decides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml", *RANKS], "none.toml: there is no such file"),
        (["small.toml"], "give the number of ranks that will train, as threads of one process: --loopback N"),
        (["small.toml", *RANKS, "--simulate", 2], "give one of them"),
        (["small.toml", *RANKS, "--search", "algorithm.gama=1"], "Did you mean 'algorithm.gamma'?"),
        (["small.toml", *RANKS, "--search", "gamma=1"], "--search gamma=1: must have the form section.key=start"),
        (["small.toml", *RANKS, "--search", "algorithm.gamma=-1"], "begins at a number > 0, e.g. --search algorithm."),
        (["small.toml", *RANKS, "--search", "algorithm.gamma=auto"], "begins at a number > 0"),
        (["small.toml", *RANKS, "--search", "compression.kind"], "--search compression.kind: the search begins at"),
        (
            ["small.toml", *RANKS, "--search", "optimizer.lr", "--search", "optimizer.lr=1"],
            "optimizer.lr is given twice",
        ),
        (["small.toml", *RANKS, "--search", "algorithm.gama"], "Did you mean 'algorithm.gamma'?"),
        (
            ["small.toml", *RANKS, "--search", "training.batch_size"],
            "training.batch_size: it takes no fractions",
        ),
        (
            ["small.toml", *RANKS, "--search", "training.batch_size=16"],
            "training.batch_size: it takes no fractions",
        ),
        (
            ["small.toml", *RANKS, "--set", "simulation.loss=0.1", "--set", "algorithm.kind=deep_squeeze"],
            "simulation.loss = 0.1 needs simulated time: give --simulate N, not --loopback N",
        ),
        (["small.toml", *RANKS, "--factor", 1], "--factor 1: must be a number > 1"),
        (["small.toml", *RANKS, "--write", "small.toml"], "--write small.toml: the file exists already"),
        (["small.toml", *RANKS, "--write", "no/x.toml"], "--write no/x.toml: there is no folder no"),
        (["small.toml", *RANKS, "--set", "data.validation=5000"], "data.validation = 5000: must be less than the 1438"),
        (["small.toml", *RANKS, "--set", "data.validation=1"], "set more, --set data.validation=N"),
        (
            ["small.toml", *RANKS, "--set", "schedule.kind=cosine", "--set", "schedule.warmup=5"],
            "The runs have --epochs 2: give --epochs more",
        ),
        (["small.toml", "--loopback", 6, "--set", "topology.kind=hypercube"], "topology.kind = 'hypercube' needs"),
    ],
)
def test_mistakes_are_one_message_before_anything_is_run(config, trials, arguments, message):
    result = tune(*arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert trials == []


def test_a_launcher_of_several_ranks_is_refused(config, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    assert "has started this 4 times: start it once" in tune(config, *RANKS).stderr


def test_a_trial_that_fails_otherwise_keeps_its_message_and_exit_code():
    text = CONFIG.replace("[model]", '[data]\nkind = "cifar10"\npath = "none"\n[model]')
    with pytest.raises(MpicompError, match=r"a trial ended with exit code 3: .*cifar10") as caught:
        run_trial(text, 1, simulate=False)
    assert caught.value.exit_code == 3
    assert run_trial(CONFIG.replace("lr = 0.1", "lr = 1e38"), 2, simulate=True) is None


@pytest.mark.parametrize("override", ["training.epochs=1", "training.steps=5"])
def test_the_length_of_the_short_runs_is_an_option(config, override):
    result = tune(config, *RANKS, "--set", override)
    assert result.exit_code == 2 and f"--set {override}: give the length of the short runs by --epochs" in result.output
