"""``mpicomp train --resume``: what goes on, what is refused, and that a refusal changes nothing; on two threads."""

import json
import re
import shutil
import threading
import time

import pytest
from click.testing import CliRunner

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.cli import main
from mpicomp.exchange import patience
from mpicomp.exchange.watchdog import Watchdog
from mpicomp.run import lock
from mpicomp.run.context import RunContext
from mpicomp.run.folder import RunFolder
from mpicomp.run.lock import RunLock

CONFIG = """
[model]
kind = "logistic"
[algorithm]
kind = "dpsgd"
[data]
kind = "synthetic"
[optimizer]
lr = 0.1
[training]
steps = 12
batch_size = 8
[run]
log_every = 3
[checkpoint]
every_steps = 4
keep_last = 0
"""


def train(*arguments, ranks=2):
    return CliRunner().invoke(main, ["train", *map(str, arguments), "--loopback", str(ranks)])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restart")
    (folder / "small.toml").write_text(CONFIG)
    assert train(folder / "small.toml", "--run-dir", folder / "run").exit_code == 0
    return folder


@pytest.fixture
def config(original):
    return original / "small.toml"


@pytest.fixture
def ended(original, tmp_path):
    return shutil.copytree(original / "run", tmp_path / "run")


def step(folder, number):
    return folder / "checkpoints" / f"step_{number:08d}"


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(folder, message, *arguments, code=2):
    """The command fails with a message, and leaves the folder as it was."""
    before = contents(folder)
    result = train(*arguments)
    assert result.exit_code == code, result.output
    assert re.search(message, result.output), result.output
    assert "Traceback" not in result.output
    assert contents(folder) == before


def test_an_edited_configuration_is_refused(ended):
    edit(ended / "config.toml", "lr = 0.1", "lr = 0.7")
    message = r"optimizer.lr was 0.1 and is now 0.7"
    assert_refused(ended, message, "--resume", ended, "--set", "training.steps=14")


def test_without_its_configuration_a_run_goes_on_under_no_other(ended, config):
    for name in ("config.toml", "metrics.jsonl", "result.json", "model.h5"):
        (ended / name).unlink()
    auto = [config, "--run-dir", ended, "--resume", "auto", "--set", "training.steps=14"]
    assert_refused(ended, r"run.seed was 0 and is now 5", *auto, "--set", "run.seed=5")
    assert "Going on after step 12" in train(*auto).output
    assert "steps = 14" in (ended / "config.toml").read_text()


def test_a_new_run_does_not_begin_among_checkpoints(ended, config):
    for name in ("config.toml", "metrics.jsonl", "result.json", "model.h5"):
        (ended / name).unlink()
    assert_refused(ended, r"already holds a run \(checkpoints\)", config, "--run-dir", ended)


@pytest.mark.parametrize("resume", ["--resume", "--run-dir"])
def test_a_folder_in_which_a_run_trains_is_refused(ended, config, monkeypatch, resume):
    monkeypatch.setattr(lock, "WAIT_S", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    other = RunLock(RunFolder(ended).lock_path)
    other.take()
    auto = [config, "--resume", "auto"] if resume == "--run-dir" else []
    command = [*auto, resume, ended, "--set", "training.steps=14"]
    assert_refused(ended, r"another run trains in this folder: PID \d+ on \S+, Slurm job 4711, since 2", *command)
    other.close()
    assert train(*command).exit_code == 0
    assert not RunFolder(ended).lock_path.exists()


def test_the_folder_is_locked_while_a_run_trains_in_it(ended, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_S", 0)
    outputs = []
    start = RunContext.start

    def start_another(run, *arguments):
        if run.world.rank == 0:
            outputs.append(json.loads(RunFolder(ended).lock_path.read_text()))
            with pytest.raises(Exception, match="another run trains"):
                RunLock(RunFolder(ended).lock_path).take()
        start(run, *arguments)

    monkeypatch.setattr(RunContext, "start", start_another)
    assert train("--resume", ended, "--set", "training.steps=14").exit_code == 0
    assert outputs[0].keys() == {"host", "pid", "slurm_job", "restarts", "started"}


@pytest.mark.parametrize("steps", [8, 12])
def test_when_no_step_is_left_nothing_is_removed(ended, steps):
    message = rf"step_00000012: is after step 12, and the run has {steps}, so nothing is left to do. To train longer"
    assert_refused(ended, message, "--resume", step(ended, 12), "--set", f"training.steps={steps}")
    if steps < 12:
        assert_refused(ended, message, "--resume", ended, "--set", f"training.steps={steps}")


def test_going_back_holds_even_if_the_new_start_dies_at_once(ended, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunContext, "start", lambda *a: 1 / 0)
        assert train("--resume", step(ended, 4)).exit_code != 0
    assert Checkpoints(ended / "checkpoints").latest().manifest.step == 4
    assert "Going on after step 4" in train("--resume", ended).output


@pytest.mark.parametrize(("ranks", "options"), [(2, []), (3, ["--resize"])])
@pytest.mark.parametrize(
    ("module", "name"), [(hdf5, "_sha256"), (RunFolder, "save_model")], ids=["reading", "writing the model"]
)
def test_slow_files_are_no_hang(ended, monkeypatch, ranks, options, module, name):
    slow, moved_meanwhile = [], set()
    quick, moved = getattr(module, name), Watchdog.moved

    def slowly(*arguments):
        slow.append(1)
        time.sleep(0.5)
        slow.pop()
        return quick(*arguments)

    def note(watchdog, step=None):
        if slow:
            moved_meanwhile.add(threading.get_ident())
        moved(watchdog, step)

    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    monkeypatch.setattr(module, name, slowly)
    monkeypatch.setattr(Watchdog, "moved", note)
    result = train("--resume", ended, *options, "--set", "training.steps=14", ranks=ranks)
    assert result.exit_code == 0, result.output
    assert len(moved_meanwhile) == ranks


def test_a_sound_checkpoint_goes_on_beside_a_damaged_manifest(ended):
    (step(ended, 12) / "manifest.json").write_text("{")
    assert_refused(ended, "manifest.json: is damaged", "--resume", ended, "--set", "training.steps=14", code=6)
    result = train("--resume", step(ended, 8))
    assert result.exit_code == 0, result.output
    assert "Going on after step 8" in result.output


def test_a_trained_model_is_not_removed_for_lack_of_checkpoints(ended, config):
    shutil.rmtree(ended / "checkpoints")
    auto = [config, "--run-dir", ended, "--resume", "auto"]
    assert_refused(ended, "has ended, and has no checkpoint to go on from", *auto, "--set", "training.steps=14")
    assert "has ended already" in train(*auto).output
    (ended / "result.json").unlink()
    result = train(*auto)
    assert "has no checkpoint: the run starts anew at step 0, and its 4 records are dropped" in result.output
    assert result.exit_code == 0, result.output


def test_a_damaged_record_does_not_block_a_restart(ended):
    edit(ended / "metrics.jsonl", '{"step": 6', '{"st')
    result = train("--resume", ended, "--set", "training.steps=14")
    assert result.exit_code == 0, result.output
    assert "metrics.jsonl: 1 damaged line was dropped" in result.output
    assert [record["step"] for record in RunFolder(ended).records()] == [3, 9, 12, 14]


@pytest.mark.parametrize("name", ["ranks.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_written_is_named(ended, name):
    (ended / name).unlink()
    (ended / name).mkdir()
    result = train("--resume", ended, "--set", "training.steps=14")
    assert (result.exit_code, "Traceback" in result.output) != (0, True), result.output
    assert re.search(rf"{name}: cannot be (written|read): Is a directory", result.output), result.output


def test_a_run_folder_may_be_named_after_steps(ended):
    folder = ended.rename(ended.with_name("step_by_step"))
    result = train("--resume", folder, "--set", "training.steps=14")
    assert result.exit_code == 0, result.output


def test_a_run_folder_instead_of_a_configuration_is_told_apart(ended):
    assert_refused(ended, rf"is a folder: .* mpicomp train --resume {ended}", ended)


def test_a_batch_larger_than_the_share_of_a_rank_is_named(config, tmp_path):
    larger = ["--set", "training.batch_size=100000", "--set", "training.steps=1"]
    result = train(config, "--run-dir", tmp_path / "large", *larger)
    assert result.exit_code == 0, result.output
    assert "training.batch_size = 100000: the smallest share of a rank is" in result.output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=9223372036854775808", "run.seed = 9223372036854775808 must be less than"),
        ("optimizer.momentum=nan", "optimizer.momentum = nan must be a number"),
    ],
)
def test_numbers_that_are_none_are_refused(config, tmp_path, override, message):
    assert_refused(tmp_path, message, config, "--run-dir", tmp_path / "run", "--set", override)


def test_a_run_that_stops_says_how_many_ranks_go_on(config, tmp_path):
    endless = ["--set", "training.steps=1000000", "--time-limit", "1s"]
    result = train(config, "--run-dir", tmp_path / "run", *endless)
    assert result.exit_code == 75, result.output
    assert f"Go on with: mpicomp train --resume {tmp_path / 'run'} --loopback 2" in result.output.replace("\n", "")


def test_a_request_to_stop_that_comes_too_late_does_not_stop_the_next_start(ended, monkeypatch):
    finish = RunContext.finish

    def ask_and_finish(run, *arguments):
        run.folder.stop_path.touch()
        return finish(run, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RunContext, "finish", ask_and_finish)
        assert train("--resume", ended, "--set", "training.steps=14").exit_code == 0
    result = train("--resume", ended, "--set", "training.steps=200")
    assert result.exit_code == 0, result.output
