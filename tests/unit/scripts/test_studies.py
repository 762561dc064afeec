"""The definition of a study, and the stages of its cells."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from mpicomp.config.config import RunConfig

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "studies"))

import outcomes as study_outcomes  # noqa: E402
import plots  # noqa: E402
import tables  # noqa: E402
from definition import Study, StudyError  # noqa: E402
from outcomes import OutOfTime, Runs  # noqa: E402
from tune import Cell, Choice, first_at  # noqa: E402

STUDIES = sorted((ROOT / "configs" / "studies").glob("*/study.toml"))
STUDY = """
title = "Two methods"
ranks = 4
epochs = 4
short_epochs = 1
points = 5
seeds = [0, 1]
validation = 100
reference = "one"
check = ["plain", "one"]
[common.data]
kind = "digits"
[common.compression]
kind = "topk"
ratio = 0.1
[settings.plain]
title = "Plain"
[settings.other]
title = "Other"
data = { partition = "dirichlet", alpha = 0.1 }
[methods.one]
algorithm = { kind = "choco" }
search."algorithm.gamma" = { start = 0.2, factor = 2 }
[methods.two]
settings = ["plain"]
algorithm = { kind = "dpsgd" }
compression = { kind = "identity" }
search."optimizer.lr" = { start = 0.1, factor = 2 }
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    return Study.read(tmp_path)


def test_a_configuration_is_made_of_all_parts(study):
    cells = {(setting.name, method.name): (setting, method) for setting, method in study.cells()}
    assert list(cells) == [("plain", "one"), ("plain", "two"), ("other", "one")]
    config = study.config(*cells["other", "one"], {"algorithm.gamma": 0.4}, epochs=4)
    assert config["data"] == {"kind": "digits", "partition": "dirichlet", "alpha": 0.1}
    assert config["algorithm"] == {"kind": "choco", "gamma": 0.4} and config["training"] == {"epochs": 4}
    assert config["compression"] == {"kind": "topk", "ratio": 0.1}
    assert study.config(*cells["plain", "two"], {})["compression"] == {"kind": "identity"}  # top-k's ratio is gone
    assert "partition" not in study.common["data"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_the_configurations_of_all_studies_are_sound(path, tmp_path):
    study = Study.read(path.parent)
    for setting, method in study.cells():
        cell = Cell(Runs(study, 0), setting, method)
        config = cell.config({axis.key: axis.start for axis in method.axes}, 0, epochs=1)
        (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
        RunConfig.load(tmp_path / "config.toml").check(study.size(setting, method))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("points = 5", "", "points is missing"),
        ("points = 5", 'points = 5\ndecide_by = "time"', "decide_by must be one of"),
        ("points = 5", "pints = 5", "pints is unknown; a study has title, ranks"),
        ('settings = ["plain"]', 'settings = ["plane"]', "methods.two.settings names 'plane'"),
        ('check = ["plain", "one"]', 'check = ["other", "two"]', "check"),
        ("{ start = 0.2, factor = 2 }", "{ start = 0.2, factor = 1 }", "methods.one.search.'algorithm.gamma'"),
        ('title = "Plain"', 'titel = "Plain"', "settings.plain.titel"),
        ("ranks = 4", "ranks = ", "study.toml"),
    ],
)
def test_a_wrong_definition_names_the_key(tmp_path, old, new, message):
    assert old in STUDY
    (tmp_path / "study.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(StudyError, match=message):
        Study.read(tmp_path)


def outcome(accuracy, epochs=4):
    curve = [[epoch, 10 * epoch, 1000 * epoch, accuracy, 1.0, 0.5 * epoch] for epoch in range(1, epochs + 1)]
    figures = {
        "diverged": False,
        "wall_s": 1.0,
        "accuracy": accuracy,
        "own_accuracy": accuracy,
        "loss": 1.0,
        "steps": 10 * epochs,
    }
    return figures | {"bytes_per_rank": 1000 * epochs, "consensus_distance": 0.0, "curve": curve}


@pytest.fixture
def trained(monkeypatch):
    """The configurations that were trained; gamma 0.4 is best in short runs and diverges in long ones."""
    configs = []

    def train(config, size, simulate):
        configs.append(config)
        gamma, epochs = config["algorithm"].get("gamma", 0.2), config["training"]["epochs"]
        if gamma > 0.4 or (gamma == 0.4 and epochs > 4):
            return {"diverged": True}
        return outcome(0.5 + gamma + 0.01 * config["run"]["seed"] / 100, epochs)

    monkeypatch.setattr(study_outcomes, "train", train)
    return configs


def test_a_setting_that_diverges_at_twice_the_length_is_not_chosen(study, trained):
    setting, method = next(study.cells())
    cell = Cell(Runs(study, math.inf), setting, method)
    choice = cell.choose()
    assert choice.values["algorithm.gamma"] == pytest.approx(0.283) and choice.is_inside
    assert [values["algorithm.gamma"] for values in choice.refused] == [0.4]
    assert all(config["data"]["validation"] == 100 and config["run"]["seed"] == 100 for config in trained)
    chosen = len(trained)
    outcomes = cell.final(choice)
    assert all("validation" not in config["data"] for config in trained[chosen:])
    assert [config["run"]["seed"] for config in trained[chosen:]] == [0, 1]
    lines = tables.table(study, setting, [tables.Finished(cell, choice, outcomes)])
    assert lines[0].startswith("| method | chosen | test accuracy (%) |")
    assert "| gamma 0.283 | 78.30 ± " in lines[2]


def test_what_is_stored_is_not_run_again(study, trained):
    setting, method = next(study.cells())
    first = Cell(Runs(study, math.inf), setting, method).choose()
    count = len(trained)
    assert len((study.folder / "runs.jsonl").read_text().splitlines()) == count
    again = Cell(Runs(study, -math.inf), setting, method).choose()
    assert again == first and len(trained) == count
    with pytest.raises(OutOfTime):
        Cell(Runs(study, time.monotonic() - 1), setting, method).final(first)


def test_a_damaged_line_is_named(study):
    (study.folder / "runs.jsonl").write_text(json.dumps({"config": "a"}) + "\n{\n")
    with pytest.raises(StudyError, match=r"runs.jsonl, line 2"):
        Runs(study, 0)


def test_targets_are_reached_by_the_mean_of_three_evaluations(study):
    qualities = [0.1, 0.9, 0.5, 0.6, 0.7, 0.8]
    curve = [[epoch, 0, 0, quality, 1 - quality] for epoch, quality in enumerate(qualities)]
    assert first_at(curve, replace(study, target=60.0))[0] == 3  # not 1, where one evaluation is above
    assert first_at(curve, replace(study, target=95.0)) is None
    by_loss = replace(study, decide_by="loss")
    assert first_at(curve, replace(by_loss, target=0.4))[0] == 3
    assert first_at(curve, replace(by_loss, target=0.05)) is None


def test_differences_are_paired_by_seed(study):
    reference, others = [outcome(0.8), outcome(0.6)], [outcome(0.81), outcome(0.61)]
    assert tables.difference(study, others, reference) == "+1.00 ± 0.00"
    assert tables.difference(study, [{"diverged": True}, outcome(0.61)], reference) == "-"
    assert tables.summary(study, [{"diverged": True}, outcome(0.61)])[0] == "61.00 (1 of 2 diverged)"


def test_a_method_may_have_a_length_of_its_own(study, trained):
    text = (study.folder / "study.toml").read_text().replace("[methods.one]", "[methods.one]\nepochs = 8")
    (study.folder / "study.toml").write_text(text)
    study = Study.read(study.folder)
    setting, method = next(study.cells())
    cell = Cell(Runs(study, math.inf), setting, method)
    cell.final(cell.choose())
    assert sorted({config["training"]["epochs"] for config in trained}) == [2, 8, 16]


def test_seconds_and_bytes_to_a_target(study):
    text = "simulate = true\ntarget = 60\n" + (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text)
    study = Study.read(study.folder)
    outcomes = [outcome(0.61), outcome(0.61), outcome(0.5)]
    assert tables.reached(study, outcomes) == ["3.00 ± 0.00 (1 of 3 never)", "0.00 ± 0.00", "2 ± 0"]
    assert tables.summary(study, outcomes)[-1] == "2"


def test_a_method_in_step_is_timed_over_other_links_by_a_few_steps(study, monkeypatch):
    head = "simulate = true\ntarget = 60\nother_links.fast.bytes_per_s = 1e9\n"
    (study.folder / "study.toml").write_text(head + (study.folder / "study.toml").read_text())
    study = Study.read(study.folder)
    setting, method = next(study.cells())
    choice = Choice({"algorithm.gamma": 0.2}, True, [], outcome(0.6), outcome(0.6), [])
    timed = []

    def train(config, size, simulate):
        timed.append(config)
        return outcome(0.6) | {"curve": [[1, 64, 0, 0.6, 1.0, 6.4]]}

    monkeypatch.setattr(study_outcomes, "train", train)
    cell = Cell(Runs(study, math.inf), setting, method)
    row = tables.Finished(cell, choice, [outcome(0.61)] * 2, cell.step_seconds(choice))
    assert timed[0]["simulation"]["bytes_per_s"] == 1e9 and timed[0]["training"]["steps"] == 400
    head, _, line = tables.table(study, setting, [row])
    place = head.split(" | ").index("seconds to 60 %, fast")
    assert line.split(" | ")[place] == "3 ± 0"  # 30 steps of a tenth of a second


def test_curves_are_drawn_for_a_study_of_simulated_time_with_a_target(study):
    setting, method = next(study.cells())
    choice = Choice({"algorithm.gamma": 0.2}, True, [], outcome(0.6), outcome(0.6), [])
    row = tables.Finished(Cell(Runs(study, math.inf), setting, method), choice, [outcome(0.61), {"diverged": True}])
    assert plots.draw_curves(study, [row]) is None
    text = "simulate = true\ntarget = 60\n" + (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text)
    picture = plots.draw_curves(Study.read(study.folder), [row]).read_text()
    assert all(text in picture for text in (method.title, "simulated seconds", "MB sent a rank", "test accuracy"))


def test_other_links_need_simulated_time(study):
    text = "other_links.fast.bytes_per_s = 1e9\n" + (study.folder / "study.toml").read_text()
    (study.folder / "study.toml").write_text(text)
    with pytest.raises(StudyError, match="other_links needs simulate = true and a target"):
        Study.read(study.folder)


def test_a_run_that_has_ended_is_a_line():
    labels = {"setting": "plain", "method": "one", "purpose": "choice", "values": {"optimizer.lr": 0.05}}
    ended = labels | {"epochs": 5, "seed": 100, "diverged": False, "accuracy": 0.9, "loss": 0.25, "wall_s": 61.2}
    line = "plain/one, choice, 5 epochs, seed 100, optimizer.lr 0.05: "
    assert study_outcomes.described(ended) == line + "accuracy 90.00 %, loss 0.25, 61 s"
    assert study_outcomes.described(ended | {"accuracy": None}) == line + "loss 0.25, 61 s"
    assert study_outcomes.described(ended | {"diverged": True}) == line + "diverged"
