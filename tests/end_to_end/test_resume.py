"""Runs that are asked to stop, and go on: signals, the stop file, the time limit; and what cannot go on."""

import os
import shutil
import signal

import pytest
from support.runs import (
    MPIEXEC,
    assert_same_checkpoint,
    mpicomp,
    mpicomp_here,
    others_long,
    ranks_of,
    records,
    start,
    wait_until,
)

from mpicomp.checkpoint.folder import Checkpoints

RUN = [
    "configs/methods/choco.toml",
    *("--set", "data.kind=synthetic"),
    *("--set", "training.steps=500"),
    *("--set", "run.log_every=7"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finished = mpicomp_here("train", *RUN, "--run-dir", folder, "--loopback", 3)
    assert finished.returncode == 0, finished.stdout
    return folder


def check_ends_alike(folder, undisturbed):
    assert_same_checkpoint(*(Checkpoints(run / "checkpoints").latest() for run in (folder, undisturbed)))
    assert records(folder) == records(undisturbed)


def is_training(folder):
    return (folder / "metrics.jsonl").exists() and len(records(folder)) > 2


def stop(folder, how):
    """Ask the run in `folder` to stop; a second time, too."""
    if how == "file":
        (folder / "stop").touch()
    else:
        ranks = ranks_of(folder)
        os.kill(ranks[-1], signal.SIGUSR1)
        for rank in ranks:
            os.kill(rank, signal.SIGUSR1)


@pytest.mark.skipif(not MPIEXEC.exists(), reason=f"no MPI in this environment: {MPIEXEC} is missing")
@pytest.mark.parametrize("how", others_long(["signal", "file"]))
def test_on_mpi_it_stops_when_asked_to_and_goes_on_bit_for_bit(tmp_path, undisturbed, how):
    folder = tmp_path / "run"
    run = start("train", *RUN, "--run-dir", folder, ranks=3)
    wait_until(lambda: is_training(folder), "training")
    stop(folder, how)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    assert f"Go on with: mpicomp train --resume {folder}" in output
    assert not (folder / "stop").exists()
    stopped = Checkpoints(folder / "checkpoints").latest().manifest.step
    assert 0 < stopped < 500
    finished = mpicomp("train", "--resume", folder, ranks=3)
    assert finished.returncode == 0, finished.stdout
    assert f"Going on after step {stopped}" in finished.stdout
    check_ends_alike(folder, undisturbed)


def test_threads_stop_by_a_signal_and_go_on_automatically(tmp_path, undisturbed):
    folder = tmp_path / "run"
    command = ["train", *RUN, "--run-dir", folder, "--resume", "auto", "--loopback", 3]
    run = start(*command)
    wait_until(lambda: is_training(folder), "training")
    stop(folder, "signal")
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 75, output
    for text in ("Going on after step", "This run has ended already"):
        again = mpicomp_here(*command)
        assert again.returncode == 0, again.stdout
        assert text in again.stdout
    check_ends_alike(folder, undisturbed)


def test_the_time_limit_stops_it(tmp_path):
    folder = tmp_path / "run"
    endless = ["--set", "training.steps=1000000"]
    run = mpicomp_here("train", *RUN, *endless, "--run-dir", folder, "--loopback", 3, "--time-limit", "2s")
    assert run.returncode == 75, run.stdout
    assert "of 1000000: time limit." in run.stdout
    assert Checkpoints(folder / "checkpoints").latest().verify() == []


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of the finished run that may be damaged."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def change(file, text):
    file.write_text(text(file.read_text()))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit flipped": (lambda step: flip(step / "rank_00002.h5"), "rank_00002.h5: is damaged (SHA-256)"),
    "cut off": (
        lambda step: os.truncate(step / "rank_00001.h5", 100),
        "rank_00001.h5: is cut off: 100 bytes instead of",
    ),
    "a file missing": (lambda step: (step / "rank_00000.h5").unlink(), "rank_00000.h5: the file is missing"),
    "files exchanged": (
        lambda step: shutil.copy(step / "rank_00000.h5", step / "rank_00001.h5"),
        "rank_00001.h5: is damaged (SHA-256)",
    ),
    "a newer format": (
        lambda step: change(step / "manifest.json", lambda text: text.replace('"version": 2', '"version": 3')),
        "was written by a newer mpicomp (format version 3",
    ),
    "no JSON": (lambda step: (step / "manifest.json").write_text("{"), "manifest.json: is damaged"),
    "of another step": (lambda step: step.rename(step.with_name("step_00000501")), "is the manifest of step 500"),
    "edited": (
        lambda step: change(step / "manifest.json", lambda text: text.replace('"Choco(', '"AdaGossip(')),
        "is damaged, or was edited",
    ),
}


def resume(folder, *options):
    return mpicomp_here("train", "--resume", folder, "--set", "training.steps=550", *options)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_nothing_is_lost(finished, damage):
    do, message = DAMAGES[damage]
    do(finished / "checkpoints" / "step_00000500")
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    run = resume(finished, "--loopback", 3)
    assert run.returncode == 6, run.stdout
    assert message in run.stdout
    assert "Traceback" not in run.stdout
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--loopback", 2], 6, "was written by 3 ranks, this run has 2"),
        (["--loopback", 3, "--set", "optimizer.lr=3"], 2, "optimizer.lr was 0.1 and is now 3.0"),
        (["--loopback", 3, "--set", "algorithm.gamma=0.3"], 2, "algorithm.gamma was 0.2 and is now 0.3"),
        (["--loopback", 3, "--set", "model.hidden=[7]"], 2, "model.hidden was"),
    ],
)
def test_another_run_is_refused(finished, options, code, message):
    run = resume(finished, *options)
    assert run.returncode == code, run.stdout
    assert message in run.stdout


@pytest.mark.parametrize("ranks", [2, 5])
def test_another_number_of_ranks_goes_on_with_resize(finished, ranks):
    run = resume(finished, "--resize", "--loopback", ranks)
    assert run.returncode == 0, run.stdout
    assert Checkpoints(finished / "checkpoints").latest().manifest.size == ranks
    assert records(finished)[-1]["step"] == 550
    assert records(finished)[-1]["loss"] < 2 * records(finished)[-20]["loss"]


AGGREGATED = ["ef_sgd", "dgc", "gmc", "sparse_loco", "efficient_adam", "onebit_adam", "fedadam_ssm"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *(
            pytest.param(method, (), marks=[pytest.mark.long] * (method != "ef_sgd"), id=method)
            for method in AGGREGATED
        ),
        pytest.param("choco", ("compression.allocation=dagc",), id="choco-dagc"),
        pytest.param("ef_sgd", ("compression.allocation=dagc", "algorithm.weights=volume"), id="ef_sgd-dagc-volume"),
    ],
)
def test_what_ranks_have_by_their_samples_is_made_anew_for_other_ranks(tmp_path, method, settings):
    """The weights of ranks and their ratios are part of the algorithm that a run has, but not of its identity."""
    every = ("data.kind=synthetic", "training.batch_size=8", "training.steps=6", "schedule.warmup=0", *settings)
    given = [word for setting in every for word in ("--set", setting)]
    folder = tmp_path / "run"
    run = mpicomp_here("train", f"configs/methods/{method}.toml", *given, "--run-dir", folder, "--loopback", 3)
    assert run.returncode == 0, run.stdout
    run = resume(folder, "--resize", "--loopback", 4, "--set", "training.steps=12")
    assert run.returncode == 0, run.stdout
    assert Checkpoints(folder / "checkpoints").latest().manifest.size == 4


def test_a_folder_that_takes_no_more_is_reported_and_training_goes_on(tmp_path):
    folder = tmp_path / "run"
    command = ["train", *RUN, "--set", "training.steps=900", "--set", "checkpoint.every_steps=100"]
    run = start(*command, "--run-dir", folder, "--loopback", 3)
    checkpoints = folder / "checkpoints"
    wait_until(lambda: (checkpoints / "latest").exists(), "the first checkpoint")
    checkpoints.rename(folder / "moved")
    checkpoints.touch()  # a file, where the folder should be
    output, _ = run.communicate(timeout=120)
    assert "mpicomp: warning: the checkpoint of step" in output
    assert "could not be written" in output
    assert run.returncode == 6, output  # the last one
    assert (folder / "result.json").exists()
    assert Checkpoints(folder / "moved").latest().verify() == []
