"""Kinds from outside the package: by import path and by entry point, each with a parameter that must be set."""

import json
import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.plugin_package import NAMES, install

from mpicomp import models
from mpicomp.algorithms import ALGORITHMS
from mpicomp.cli import main
from mpicomp.compression import COMPRESSORS, TopK
from mpicomp.config.config import RunConfig
from mpicomp.config.schedule import SCHEDULES
from mpicomp.config.sections import OPTIMIZERS
from mpicomp.config.toml import parse
from mpicomp.data import datasets
from mpicomp.data.partition import PARTITIONS, partition
from mpicomp.errors import ConfigError
from mpicomp.plugins import GROUPS, find, names
from mpicomp.topology import TOPOLOGIES, make_topology

REGISTRIES = (datasets.DATASETS, PARTITIONS, models.MODELS, TOPOLOGIES, COMPRESSORS, ALGORITHMS, OPTIMIZERS, SCHEDULES)

PARAMETERS = {
    "data": {"samples": 90},
    "model": {"scale": 0.5},
    "topology": {"lazy": "true"},
    "compression": {"ratio": 0.5},
    "algorithm": {"rho": 0.5},
    "schedule": {"exponent": 1.0},
    "optimizer": {"floor": 1.0, "lr": 2.0},
}
PATHS = {
    "data": "lines",
    "model": "Scaled",
    "topology": "path",
    "compression": "Largest",
    "algorithm": "Elastic",
    "schedule": "Power",
    "optimizer": "Sign",
}


def offered(section):
    """The name under which the package offers what it has for a section."""
    ((name, _),) = ((n, a) for n, a in NAMES[GROUPS[f"{section}.kind"]].items() if a == PATHS[section])
    return name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package, installed into a folder of its own; nothing of it is left afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, "from_outside", "from-outside")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    yield folder
    sys.modules.pop("from_outside", None)


def settings(by_path):
    """The overrides that choose everything from the package: by import path, or by name where packages can offer."""
    for section, own in PARAMETERS.items():
        path = f"from_outside:{PATHS[section]}"
        kind = path if by_path or section == "optimizer" else offered(section)
        yield f"{section}.kind='{kind}'"
        yield from (f"{section}.{key}={value}" for key, value in own.items())
    yield from ("data.partition='from_outside:blocks'", "data.first=30")


def load(tmp_path, *overrides):
    (tmp_path / "run.toml").write_text("[optimizer]\nlr = 0.1\n[training]\nsteps = 40\nbatch_size = 8\n")
    return RunConfig.load(tmp_path / "run.toml", overrides)


def refusal(tmp_path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides)
    return str(caught.value).partition(": ")[2]


@pytest.mark.parametrize("by_path", [True, False], ids=["import path", "entry point"])
def test_everything_may_come_from_outside(package, tmp_path, by_path):
    before = [dict(registry) for registry in REGISTRIES]
    config = load(tmp_path, *settings(by_path))
    assert RunConfig.from_toml(config.to_toml()) == config
    assert isinstance(config.compression.build(), TopK) and config.compression.build().ratio == 0.5
    assert config.algorithm.build(TopK(0.5)).compressor == TopK(0.5)
    dataset = config.data.load()
    assert [len(part) for part in config.data.split(dataset.train_labels, 2, seed=0)] == [30, 50]
    assert config.model.build(dataset, seed=0).scale == 0.5
    assert config.topology.build(3).mixing[0, 2] == 0
    assert config.schedule.build(3.0)(0.0) == 1.0 > config.schedule.build(3.0)(2.0)
    assert [dict(registry) for registry in REGISTRIES] == before


def train(*arguments):
    result = CliRunner().invoke(main, ["train", "--loopback", "2", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def overriding(lines):
    return [word for line in lines for word in ("--set", line)]


@pytest.mark.parametrize("by_path", [True, False], ids=["import path", "entry point"])
def test_a_regression_from_outside_trains_and_reports_its_loss(package, tmp_path, by_path):
    load(tmp_path)
    output = train("run.toml", "--run-dir", "out", *overriding(settings(by_path)))
    stored = json.loads((tmp_path / "out/result.json").read_text())
    assert stored["test_accuracy"] is None and stored["test_accuracy_local"] == [None, None]
    assert f"Test loss: {stored['test_loss']:.4g} of the averaged model." in output
    assert "Test accuracy" not in output
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert stored["test_loss"] == records[-1]["test_loss"] < 0.1 < 1 < records[0]["loss"]
    assert records[-1]["test_accuracy"] is None

    evaluated = CliRunner().invoke(main, ["evaluate", "out"]).output
    assert f"test loss {stored['test_loss']:.4f}\n" in evaluated and "accuracy" not in evaluated
    assert CliRunner().invoke(main, ["plot", "out"]).exit_code == 0
    # It goes on from its checkpoint, whose configuration names the same factories.
    assert "Test loss" in train("--resume", "out", "--set", "training.steps=50")


def test_the_loss_is_the_data_sets(package, tmp_path):
    config = load(tmp_path, *settings(True))
    dataset = config.data.load()
    outputs, targets = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert dataset.loss(outputs, targets) == 4.5
    assert datasets.load("from_outside:lines", samples=20, power=1.0).loss(outputs, targets) == 1.5


def test_a_loss_that_is_no_scalar_is_refused(package, tmp_path):
    load(tmp_path)
    lines = [line for line in settings(True) if line.split(".")[0] == "model"]
    lines += ["data.kind='from_outside:each'"]
    result = CliRunner().invoke(main, ["train", "run.toml", "--loopback", "2", *overriding(lines)])
    assert result.exit_code == 2
    assert "the loss of data.kind = 'each' must be a scalar tensor, and is a tensor of shape (8, 2)" in result.output


def test_an_accuracy_of_ones_own(package, tmp_path):
    load(tmp_path)
    lines = ["data.kind='from_outside:near'", "model.kind='from_outside:Scaled'", "model.scale=0.5"]
    output = train("run.toml", "--run-dir", "out", *overriding(lines))
    stored = json.loads((tmp_path / "out/result.json").read_text())
    assert stored["test_accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0) and len(stored["test_accuracy_local"]) == 2
    assert f"Test accuracy: {stored['test_accuracy']:.2%}" in output


def test_an_asynchronous_regression_has_no_accuracy_either(package, tmp_path):
    load(tmp_path)
    lines = [line for line in settings(True) if line.split(".")[0] in ("data", "model")]
    lines = [line for line in lines if not line.startswith(("data.first", "data.partition"))]
    lines += ["algorithm.kind=asgd", "topology.kind=star", "training.steps=20"]
    output = train("run.toml", "--run-dir", "out", *overriding(lines))
    stored = json.loads((tmp_path / "out/result.json").read_text())
    assert stored["test_accuracy"] is None and stored["test_loss"] > 0
    assert "Test loss" in output


def test_functions_of_the_package_take_them_too(package):
    assert len(datasets.load("lines", samples=50).train) == 40
    assert isinstance(models.build("from_outside:Scaled", (3,), 2, 0, scale=2.0), torch.nn.Linear)
    assert make_topology("path", 3, lazy=False).size == 3
    assert len(partition("from_outside:blocks", torch.zeros(10, dtype=torch.int64).numpy(), 2, 0, first=4)[0]) == 4
    with pytest.raises(ConfigError, match=r"model.scale is missing: model.kind = 'scaled' needs it"):
        models.build("scaled", (3,), 2, 0)
    with pytest.raises(ConfigError, match=r"model.skale is no parameter of .*'scaled'. Did you mean 'scale'"):
        models.build("scaled", (3,), 2, 0, skale=1.0)


@pytest.mark.parametrize("section", sorted(PARAMETERS))
def test_a_missing_parameter_is_named(package, tmp_path, section):
    key = next(iter(PARAMETERS[section]))
    kind = f"from_outside:{PATHS[section]}"
    message = refusal(tmp_path, f"{section}.kind='{kind}'")
    assert f"{section}.{key} is missing: {section}.kind = '{kind}' needs it" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind='no_such_module:X'", "model.kind = 'no_such_module:X': 'no_such_module' cannot be imported"),
        ("data.kind='json:X'", "data.kind = 'json:X': module 'json' has no attribute 'X'"),
        ("topology.kind='json:'", "topology.kind = 'json:': module 'json' has no attribute ''"),
        ("algorithm.kind='json:__name__'", "'json:__name__' is no class or function whose parameters can be read"),
        ("compression.kind='broken:X'", "'broken' cannot be imported: ZeroDivisionError('division by zero')"),
        ("compression.kind='pathlib:PurePath'", "'pathlib:PurePath' makes a PurePosixPath, not a Compressor"),
        ("algorithm.kind='from_outside:wrong'", "makes a int, not a Algorithm or AsynchronousAlgorithm"),
        ("optimizer.kind='from_outside:wrong'", "optimizer.kind = 'from_outside:wrong' makes a int, not a Optimizer"),
        ("model.kind='from_outside:takes_a_module'", "its parameter 'body' has no default, but TOML cannot set it"),
        ("model.kind='hints:later'", "its type hints cannot be read: name 'Problem' is not defined"),
        (
            "model.kind='hints:taken'",
            "its parameter 'kind' needs another name: the section [model] has that one already",
        ),
        ("topology.kind='hints:method'", "its parameter 'build' needs another name: the section [topology]"),
        ("data.partition='hints:both'", "its parameter 'samples' needs another name: the section [data] has that one"),
        ("model.kind='hints:no_int'", "the default of its parameter 'width', 'wide', is not of its type"),
    ],
)
def test_what_is_wrong_with_one_is_named(package, tmp_path, override, message):
    (package / "broken.py").write_text("1 / 0\n")
    (package / "hints.py").write_text(
        "from __future__ import annotations\n"
        "def later(problem: Problem): pass\n"
        "def no_int(p, width: int = 'wide'): pass\n"
        "def taken(p, kind: str = ''): pass\n"
        "def method(size, build: bool = True): pass\n"
        "def both(labels, ranks, seed, samples: int = 1): pass\n"
    )
    try:
        assert message in refusal(tmp_path, override, *(["data.kind=synthetic"] if "both" in override else []))
    finally:
        sys.modules.pop("hints", None)


def test_what_is_made_is_checked_when_it_is_made(package, tmp_path):
    digits = datasets.load("digits")
    for section, build, kind in (
        ("data", lambda config: config.data.load(), "Dataset"),
        ("model", lambda config: config.model.build(digits, 0), "Module"),
        ("topology", lambda config: config.topology.build(2), "Schedule"),
        ("schedule", lambda config: config.schedule.build(2.0), "LearningRateSchedule"),
    ):
        config = load(tmp_path, f"{section}.kind='from_outside:wrong'")
        with pytest.raises(ConfigError, match=rf"{section}.kind = 'from_outside:wrong' makes a int, not a {kind}"):
            build(config)
    with pytest.raises(ConfigError, match=r"must give each of 2 ranks samples, and gives: 1438"):
        load(tmp_path, "data.partition='from_outside:unequal'").data.split(digits.train_labels, 2, 0)
    with pytest.raises(ConfigError, match=r"topology.kind = 'from_outside:refuses': out of luck"):
        make_topology("from_outside:refuses", 2)
    with pytest.raises(ConfigError, match=r"'from_outside:no_first_argument' must take 1 argument by position, before"):
        models.build("from_outside:no_first_argument", (3,), 2, 0, width=1)


def test_the_current_folder_is_searched(tmp_path, monkeypatch):
    (tmp_path / "compressor_of_mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from mpicomp.compression import Identity\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Identity):\n"
        "    level: float = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        assert load(tmp_path, "compression.kind='compressor_of_mine:Mine'").compression.level == 1.0
    finally:
        sys.modules.pop("compressor_of_mine", None)


def test_names_of_packages_are_known_names(package, tmp_path):
    assert names("topology.kind", TOPOLOGIES)[-1] == "path"
    message = refusal(tmp_path, "topology.kind=paht")
    assert "topology.kind = 'paht' is unknown. Did you mean 'path'? Known: " in message and ", path, " in message
    assert "elastic" in refusal(tmp_path, "algorithm.kind=3")
    assert "largest" in refusal(tmp_path, "downlink.kind=none")
    shown = CliRunner().invoke(main, ["topology", "path", "--ranks", "4", "--set", "lazy=false"]).output
    assert "graph, 4 ranks" in shown


def test_the_name_of_a_built_in_stays_its_own(package):
    assert find("model.kind", "mlp", models.MODELS) is models.MODELS["mlp"]
    assert names("model.kind", models.MODELS).count("mlp") == 1


def test_a_name_that_two_packages_offer_is_refused(package, tmp_path):
    install(package, "from_elsewhere", "from-elsewhere", {"mpicomp.topologies": {"path": "path"}})
    message = refusal(tmp_path, "topology.kind=path", "topology.lazy=true")
    assert "topology.kind = 'path' is offered by 2 packages, " in message
    for part in ("from-outside", "from-elsewhere", "'from_outside:path'", "'from_elsewhere:path'"):
        assert part in message
    assert load(tmp_path, "topology.kind='from_elsewhere:path'", "topology.lazy=true").topology.build(2).size == 2
    sys.modules.pop("from_elsewhere", None)


def test_an_entry_point_that_leads_nowhere_names_its_package(package, tmp_path):
    install(package, "from_elsewhere", "from-elsewhere", {"mpicomp.models": {"deep": "Deep"}})
    message = refusal(tmp_path, "model.kind=deep")
    assert "model.kind = 'deep' of the package from-elsewhere: module 'from_elsewhere' has no" in message
    sys.modules.pop("from_elsewhere", None)


def test_the_entry_points_of_the_page_are_those_of_its_module(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/how_to/plugins.md").read_text()
    files = dict(re.findall(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    (tmp_path / "waves.py").write_text(files["waves.py"])
    monkeypatch.syspath_prepend(tmp_path)
    groups = parse(files["pyproject.toml"], "pyproject.toml")["project"]["entry-points"]
    assert groups.keys() <= set(GROUPS.values())
    try:
        for group, entries in groups.items():
            for name, path in entries.items():
                assert callable(EntryPoint(name, path, group).load())
    finally:
        sys.modules.pop("waves", None)
    assert set(re.findall(r"`(mpicomp\.\w+)`", page[page.index("## In a package") :])) == set(GROUPS.values())
