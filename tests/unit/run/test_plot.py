"""The curves of runs, and the picture of them."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.replica.record import Record
from mpicomp.run.folder import RunFolder
from mpicomp.run.plot import figure, read_runs
from mpicomp.run.result import Result


@pytest.fixture
def make(tmp_path):
    def make_run(name, records=5, consensus=0.1, validation=0, is_simulated=False):
        folder = RunFolder.create(tmp_path / name)
        folder.save_config(
            RunConfig.from_toml(f"optimizer.lr = 0.1\ntraining.steps = 3\ndata.validation = {validation}")
        )
        if is_simulated:
            folder.save_result(
                Result("dpsgd", "ring", "identity", 2, 3, 1.0, 0.5, 0.9, [], [], 0.0, 5, 1.0, is_simulated=True)
            )
        for i in range(1, records + 1):
            accuracy = 0.1 * i if i % 2 else None
            folder.on_record(Record(i, i / 2, 1 / i, 0.1, 10 * i, {"gradient": 0.5, "mix": 0.5}, consensus, accuracy))
        return folder.path

    return make_run


def test_curves_are_read(make):
    (run,) = read_runs([make("a")])
    assert run.name == "a"
    np.testing.assert_allclose(run.curves["steps"], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(run.curves["bytes"], [10, 20, 30, 40, 50])
    np.testing.assert_allclose(run.curves["seconds"], [1, 2, 3, 4, 5])
    np.testing.assert_allclose(run.curves["accuracy"], [0.1, np.nan, 0.3, np.nan, 0.5])


def test_runs_of_the_same_name_are_told_apart(make):
    names = [run.name for run in read_runs([make("x/seed0"), make("y/seed0")])]
    assert len(set(names)) == 2


def test_the_figure_has_nine_panels_and_one_legend(make):
    picture = figure(read_runs([make("a"), make("b", records=9)]))
    assert len(picture.axes) == 9
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["a", "b"]
    accuracy = picture.axes[3].lines[0]
    np.testing.assert_allclose(accuracy.get_xdata(), [1, 3, 5])
    assert picture.axes[1].get_xscale() == "log"
    assert picture.axes[8].get_xlabel() == "seconds of training"


def test_runs_without_accuracy_show_their_test_loss(make):
    path = make("a")
    records = [Record(i, i / 2, 1 / i, 0.1, 10 * i, {"mix": 1.0}, 0.1, test_loss=0.5 / i) for i in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
    picture = figure(read_runs([path]))
    assert picture.axes[3].get_ylabel() == "test loss"
    np.testing.assert_allclose(picture.axes[3].lines[0].get_ydata(), [0.5, 0.25, 0.5 / 3])
    both = figure(read_runs([path, make("b")]))
    assert both.axes[3].get_ylabel() == "test accuracy"


def test_language_models_show_their_perplexity(make):
    path = make("a")
    records = [Record(i, i / 2, 1 / i, 0.1, 10 * i, {"mix": 1.0}, 0.1, None, test_loss=2 / i) for i in (1, 2, 3)]
    records = [dataclasses.replace(record, test_perplexity=math.exp(record.test_loss)) for record in records]
    (path / "metrics.jsonl").write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
    picture = figure(read_runs([path]))
    labels = [picture.axes[row].get_ylabel() for row in (0, 3, 6, 9)]
    assert labels == ["training loss (nats)", "test loss (nats)", "test perplexity", "consensus distance"]
    np.testing.assert_allclose(picture.axes[6].lines[0].get_ydata(), np.exp([2, 1, 2 / 3]))


def test_runs_say_what_their_accuracy_and_their_seconds_are(make):
    def labels(*paths):
        axes = figure(read_runs(paths)).axes
        return axes[3].get_ylabel(), axes[8].get_xlabel()

    plain, held_out, simulated = make("a"), make("b", validation=100), make("c", is_simulated=True)
    assert labels(held_out) == ("validation accuracy", "seconds of training")
    assert labels(simulated) == ("test accuracy", "simulated seconds of training")
    mixed = (plain, held_out, simulated)
    assert labels(*mixed) == ("test and validation accuracy", "real and simulated seconds of training")
    (legend,) = figure(read_runs(mixed)).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a (test, real time)",
        "b (validation, real time)",
        "c (test, simulated time)",
    ]


def test_zeros_do_not_spoil_the_scales(make, tmp_path):
    picture = figure(read_runs([make("ssgd", consensus=0.0)]))
    picture.savefig(tmp_path / "plot.png")
    assert picture.axes[6].get_yscale() == "linear"


def test_a_run_without_records_is_refused(make):
    path = make("empty", records=0)
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="holds no record yet"):
        read_runs([path])


def test_a_file_of_something_else_is_refused(make):
    path = make("other")
    (path / "metrics.jsonl").write_text('{"steps": 3}\n')
    with pytest.raises(CheckpointError, match="is not a file of records"):
        read_runs([path])


def test_a_missing_matplotlib_is_named(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        figure(read_runs([make("a")]))
