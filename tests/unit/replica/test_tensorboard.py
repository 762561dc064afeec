"""What is written for TensorBoard, read back by its own reader; and ``mpicomp train --tensorboard``."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import mpicomp
from mpicomp.algorithms import Choco
from mpicomp.cli import main
from mpicomp.compression import TopK
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback
from mpicomp.replica.record import Record
from mpicomp.topology import ring

SMALL = ["--set", "data.kind=synthetic", "--set", "schedule.warmup=0", "--set", "run.log_every=5"]
CHOCO = ["configs/methods/choco.toml", *SMALL]


def curves(folder):
    """Return the curves by name, each as ``{step: value}``."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def train(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def expected(folder):
    """Return the curves of ``metrics.jsonl``; an event holds a float32."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in Record(**record).scalars().items():
            found.setdefault(name, {})[record["step"]] = pytest.approx(value, rel=1e-6)
    return found


def test_a_script_of_ones_own_writes_its_metrics(tmp_path):
    def serve(world):
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gossip = mpicomp.distribute(model, optimizer, Choco(0.2, TopK(0.5)), ring, world=world)
        board = mpicomp.TensorBoard(tmp_path / f"rank-{world.rank}")
        records = []
        for _ in range(3):
            gossip.step(lambda: model(torch.ones(3)).square().sum())
            records.append(gossip.metrics())
            if world.rank == 0:
                board.on_record(records[-1])
        before_closing = curves(tmp_path / "rank-0")
        board.close()
        return records, before_closing

    (records, before_closing), *_ = loopback.run(2, serve)
    found = curves(tmp_path / "rank-0")
    assert found == before_closing
    parts = ("gradient", "compress", "exchange", "mix", "exchange_hidden", "other")
    assert set(found) == {
        "loss",
        "lr",
        "bytes_sent",
        "consensus_distance",
        "diagnostics/compression_error",
        *(f"seconds/{part}" for part in parts),
    }
    assert found["loss"] == {r.step: pytest.approx(r.loss) for r in records}
    assert found["bytes_sent"] == {r.step: r.bytes_sent for r in records}
    assert found["seconds/other"] == {r.step: pytest.approx(r.seconds["other"]) for r in records}
    assert not (tmp_path / "rank-1").exists()


def test_a_start_that_goes_on_hides_what_it_does_anew(tmp_path):
    def record(step, loss):
        return Record(step, None, loss, 0.1, 0, {}, None)

    first = mpicomp.TensorBoard(tmp_path)
    for step in (10, 20, 30, 33):
        first.on_record(record(step, 1.0))
    first.close()
    again = mpicomp.TensorBoard(tmp_path, after_step=20)
    again.on_record(record(30, 2.0))
    again.close()
    again.on_record(record(40, 3.0))
    again.close()
    assert curves(tmp_path)["loss"] == {10: 1, 20: 1, 30: 2, 40: 3}


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"TensorBoard cannot write into .*file"):
        mpicomp.TensorBoard(tmp_path / "file").on_record(Record(1, None, 1.0, 0.1, 0, {}, None))


def test_without_the_package_it_says_what_to_install(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    message = "pip install tensorboard"
    with pytest.raises(ConfigError, match="TensorBoard is not installed") as failure:
        mpicomp.TensorBoard(tmp_path)
    assert message in str(failure.value)
    outcome = train(*CHOCO, "--loopback", 2, "--run-dir", tmp_path / "run", "--tensorboard")
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", [CHOCO, ["configs/methods/dc_gossip.toml", *SMALL]])
def test_a_run_writes_its_metrics(tmp_path, method):
    outcome = train(
        *method, "--set", "training.steps=60", "--loopback", 2, "--run-dir", tmp_path / "run", "--tensorboard"
    )
    assert outcome.exit_code == 0, outcome.output
    found = curves(tmp_path / "run" / "tensorboard")
    assert found == expected(tmp_path / "run")
    assert {"loss", "test_accuracy", "seconds/exchange", "diagnostics/compression_error", "epoch"} <= set(found)


def test_a_run_that_goes_on_goes_on_with_its_curves(tmp_path):
    """From the middle of a run, to an earlier end: nothing is left of what the first start did after that."""
    folder = tmp_path / "run"
    more = ["--loopback", 2, "--tensorboard"]
    end = ["--set", "checkpoint.every_steps=20", "--set", "checkpoint.keep_last=9", "--set", "training.steps=48"]
    assert train(*CHOCO, *end, *more, "--run-dir", folder).exit_code == 0
    assert {35, 45, 48} <= set(curves(folder / "tensorboard")["loss"])
    (checkpoint,) = (folder / "checkpoints").glob("step_*20")
    outcome = train("--resume", checkpoint, "--set", "training.steps=32", *more)
    assert outcome.exit_code == 0, outcome.output
    found = curves(folder / "tensorboard")
    assert found == expected(folder)
    assert {5, 20, 25, 32} <= set(found["loss"])
    assert max(found["loss"]) == 32


def test_nothing_is_written_unless_it_is_asked_for(tmp_path):
    assert train(*CHOCO, "--set", "training.steps=5", "--loopback", 2, "--run-dir", tmp_path / "run").exit_code == 0
    assert not (tmp_path / "run" / "tensorboard").exists()
