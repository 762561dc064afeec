"""The folder of a run: what is refused, and that what is written comes back."""

import contextlib
import itertools
import json

import h5py
import pytest
import torch
from support.runs import mpicomp_here
from support.tied import Tied
from support.tmpfs import small_disk  # noqa: F401
from torch import nn

from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError, ConfigError
from mpicomp.files import Lines
from mpicomp.replica.record import Record
from mpicomp.run import folder as run_folder
from mpicomp.run.folder import RunFolder
from mpicomp.run.result import Result

CONFIG = RunConfig.from_toml("optimizer.lr = 0.1\ntraining.steps = 3")


def record(step, accuracy=None):
    return Record(step, step / 10, 0.5, 0.1, 100 * step, {"gradient": 0.1}, 0.0, accuracy)


RESULT = Result("dpsgd", "ring", "identity", 2, 3, 1.0, 0.5, 0.9, [0.8, 0.9], [10, 10], 0.0, 5, 1.0)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "a" / "run")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


@pytest.mark.parametrize("file", ["config.toml", "metrics.jsonl", "result.json"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path, file):
    (tmp_path / file).write_text("")
    with pytest.raises(
        ConfigError, match=rf"already holds a run \({file}\): give another --run-dir, remove it, or go on"
    ):
        RunFolder.create(tmp_path)


def test_a_folder_with_other_files_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    RunFolder.create(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "run")


def test_runs_without_a_name_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {RunFolder.create_named("choco").path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == run_folder.RUNS and path.name.startswith("choco-2") for path in paths)


def test_opening_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config.toml"):
        RunFolder.open(tmp_path)


def test_the_configuration_comes_back(folder):
    folder.save_config(CONFIG)
    assert RunConfig.load(RunFolder.open(folder.path).config_path) == CONFIG


def test_records_come_back(folder):
    folder.on_record(record(1))
    folder.on_record(record(2, accuracy=0.5))
    first, second = folder.records()
    assert (first["step"], first["test_accuracy"], first["seconds"]) == (1, None, {"gradient": 0.1})
    assert (second["step"], second["test_accuracy"]) == (2, 0.5)


def test_a_record_that_was_cut_off_is_left_out(folder):
    folder.on_record(record(1))
    with folder.metrics_path.open("a") as file:
        file.write('{"step": 2, "ep')
    assert [r["step"] for r in folder.records()] == [1]


def test_records_wait_for_a_disk_that_is_full(small_disk):  # noqa: F811
    folder = RunFolder.create(small_disk / "run")
    folder.on_record(record(1))
    with (small_disk / "other").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    steps = itertools.count(2)
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        for step in steps:  # the last page of the file takes some
            folder.on_record(record(step))
    assert folder.waiting_records == 1
    for count in (2, 3):
        with pytest.raises(ConfigError, match="No space left"):
            folder.on_record(record(next(steps)))
        assert folder.waiting_records == count
    (small_disk / "other").unlink()
    last = next(steps)
    folder.on_record(record(last))
    assert folder.waiting_records == 0
    assert [each["step"] for each in folder.records()] == list(range(1, last + 1))


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A run in which the records of steps 4 to 6 cannot be written, and later ones neither if `lasts`."""
    text = '[data]\nkind = "synthetic"\n[model]\nkind = "logistic"\n[optimizer]\nlr = 0.1\n[run]\nlog_every = 1\n'
    (tmp_path / "small.toml").write_text(text)
    write = Lines.write

    def train(lasts):
        def fail(lines):
            steps = [json.loads(line)["step"] for line in lines.waiting]
            if steps and steps[-1] >= 4 and (lasts or steps[-1] <= 6):
                raise OSError(28, "No space left on device")
            write(lines)

        monkeypatch.setattr(Lines, "write", fail)
        options = ["--loopback", 2, "--set", "training.steps=9", "--set", "training.batch_size=8"]
        return mpicomp_here("train", tmp_path / "small.toml", "--run-dir", tmp_path / "run", *options)

    return train


def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(small_run, tmp_path):
    done = small_run(lasts=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("metrics.jsonl: cannot be written: No space left on device: training goes on") == 1
    assert [each["step"] for each in RunFolder(tmp_path / "run").records()] == list(range(1, 10))


def test_records_that_cannot_be_written_to_the_end_are_an_error(small_run, tmp_path):
    done = small_run(lasts=True)
    assert done.returncode == ConfigError.exit_code, done.stdout
    assert "error: " in done.stdout and (tmp_path / "run" / "model.h5").exists()
    assert [each["step"] for each in RunFolder(tmp_path / "run").records()] == [1, 2, 3]


def test_damaged_records_are_named(folder):
    folder.metrics_path.write_text("{}\nnonsense\n{}\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: line 2 is damaged"):
        folder.records()
    folder.metrics_path.unlink()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be read"):
        folder.records()


def test_the_result_is_json(folder):
    folder.save_result(RESULT)
    stored = json.loads(folder.result_path.read_text())
    assert {"algorithm", "topology", "compressor", "ranks", "steps", "seconds", "train_loss"} <= set(stored)
    assert stored["test_accuracy_local"] == [0.8, 0.9]
    assert stored["bytes_sent"] == [10, 10]
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def test_a_result_is_written_whole_or_not_at_all(folder, monkeypatch):
    folder.save_result(RESULT)
    before = folder.result_path.read_text()
    monkeypatch.setattr(run_folder, "to_json", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.save_result(RESULT)
    assert folder.result_path.read_text() == before
    assert [path.name for path in folder.path.iterdir()] == ["result.json"]


def test_the_model_comes_back(folder):
    stored = model()
    stored(torch.randn(8, 3))
    folder.save_model(stored, CONFIG)
    fresh = model()
    with torch.no_grad():
        fresh[0].weight.zero_()
    folder.load_model(fresh)
    for name, tensor in stored.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_the_model_is_plain_hdf5(folder):
    folder.save_model(model(), CONFIG)
    with h5py.File(folder.model_path) as file:
        assert file["parameters/0.weight"].shape == (4, 3)
        assert file["buffers/1.running_mean"].shape == (4,)
        assert file.attrs["version"] == 1
        assert RunConfig.from_toml(file.attrs["config"]) == CONFIG


def test_tied_weights_have_all_their_names_and_are_stored_once(folder):
    stored = Tied()
    folder.save_model(stored, CONFIG)
    with h5py.File(folder.model_path) as file:
        names = {name for group in ("parameters", "buffers") for name in file[group]}
        assert names == set(stored.state_dict())
        assert file["parameters/head.weight"] == file["parameters/embedding.weight"]  # one dataset
    fresh = Tied()
    folder.load_model(fresh)
    assert torch.equal(fresh.head.weight, stored.head.weight)
    with h5py.File(folder.model_path, "a") as file:  # as it was written before
        for name in ("head.weight", "again.weight", "again.bias"):
            del file[f"parameters/{name}"]
    fresh = Tied()
    folder.load_model(fresh)
    assert torch.equal(fresh.head.weight, stored.head.weight)


def test_a_model_on_a_full_disk_leaves_nothing(small_disk):  # noqa: F811
    folder = RunFolder(small_disk)
    with pytest.raises(CheckpointError, match=r"model.h5\.\w+: cannot be written: No space left on device"):
        folder.save_model(nn.Linear(1000, 1000), CONFIG)
    assert list(small_disk.iterdir()) == []


def test_damage_in_a_model_is_found(folder):
    folder.save_model(model(), CONFIG)
    with h5py.File(folder.model_path) as file:
        position = file["parameters/0.weight"].id.get_offset()
    content = bytearray(folder.model_path.read_bytes())
    content[position] ^= 1
    folder.model_path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the dataset /parameters/0.weight is damaged"):
        folder.load_model(model())


def test_half_precision_is_kept(folder):
    stored = model().to(torch.bfloat16)
    folder.save_model(stored, CONFIG)
    fresh = model().to(torch.bfloat16)
    folder.load_model(fresh)
    assert torch.equal(stored[0].weight, fresh[0].weight)


def test_another_model_is_refused_and_left_alone(folder):
    folder.save_model(model(), CONFIG)
    other = nn.Sequential(nn.Linear(3, 5), nn.Identity(), nn.Linear(5, 2))
    before = other[2].weight.clone()
    with pytest.raises(CheckpointError) as caught:
        folder.load_model(other)
    for text in (
        "has parameters/0.weight of shape (4, 3) instead of (5, 3)",
        "lacks parameters/2.bias",
        "has parameters/1.weight, which the model lacks",
    ):
        assert text in str(caught.value)
    assert torch.equal(other[2].weight, before)


def test_model_files_that_cannot_be_read(folder):
    with pytest.raises(CheckpointError, match="there is no such file; did the run end well"):
        folder.load_model(model())
    folder.model_path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="is damaged"):
        folder.load_model(model())
    with h5py.File(folder.model_path, "w") as file:
        file["x"] = 1
    with pytest.raises(CheckpointError, match="is not a model of mpicomp"):
        folder.load_model(model())
    folder.save_model(model(), CONFIG)
    with h5py.File(folder.model_path, "a") as file:
        file.attrs["version"] = 2
    with pytest.raises(CheckpointError, match="written by a newer mpicomp"):
        folder.load_model(model())


def test_a_run_that_fails_early_leaves_its_name_free(folder):
    with pytest.raises(RuntimeError), folder.kept_if_used():
        folder.save_config(CONFIG)
        raise RuntimeError
    assert not folder.path.exists()


def test_a_run_that_fails_early_leaves_other_files_alone(folder):
    (folder.path / "notes.txt").write_text("")
    with pytest.raises(RuntimeError), folder.kept_if_used():
        folder.save_config(CONFIG)
        raise RuntimeError
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_a_run_that_fails_later_is_kept(folder):
    with pytest.raises(RuntimeError), folder.kept_if_used():
        folder.save_config(CONFIG)
        folder.on_record(record(1))
        raise RuntimeError
    assert folder.config_path.exists()


def test_a_run_with_a_checkpoint_is_kept_though_it_has_no_record(folder):
    with pytest.raises(KeyboardInterrupt), folder.kept_if_used():
        folder.save_config(CONFIG)
        (folder.checkpoints_path / "step_00000004").mkdir(parents=True)
        (folder.checkpoints_path / "step_00000004" / "manifest.json").touch()
        raise KeyboardInterrupt
    assert folder.config_path.exists()


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", "\udcff"])
def test_a_restart_drops_damaged_records(folder, line):
    folder.on_record(record(1))
    with folder.metrics_path.open("a", errors="surrogateescape") as file:
        file.write(f"{line}\n")
    folder.on_record(record(2))
    folder.on_record(record(3))
    assert folder.has_record(2)
    assert folder.rewind(2) == 1
    assert [r["step"] for r in folder.records()] == [1, 2]


def test_what_cannot_be_written_is_named(folder):
    folder.config_path.mkdir()
    with pytest.raises(ConfigError, match=r"config.toml: cannot be written: Is a directory"):
        folder.save_config(CONFIG)


def test_survivors_on_one_side_only_go_on(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.claim(1) and not RunFolder(tmp_path).claim(1)
    assert folder.claim(2)
    folder.remove_claims()
    assert list(tmp_path.iterdir()) == [] and folder.claim(1)
