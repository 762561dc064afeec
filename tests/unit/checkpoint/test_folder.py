import json
import os

import pytest
import torch

from mpicomp.checkpoint import folder, hdf5
from mpicomp.checkpoint.folder import Checkpoints, Manifest, open_checkpoint, rank_file
from mpicomp.errors import CheckpointError


def manifest(step, files):
    return Manifest(
        step=step,
        size=len(files),
        algorithm="DPSGD()",
        topology="ring 0",
        model="Linear",
        config="",
        versions={"torch": "2"},
        created="2026-01-01T00:00:00+00:00",
        slurm_job=None,
        files={rank_file(rank): digest for rank, digest in enumerate(files)},
    )


def save(checkpoints, step, size=2):
    folder = checkpoints.begin(step)
    digests = [hdf5.write(folder / rank_file(rank), leaves(step, rank), {}) for rank in range(size)]
    return checkpoints.publish(manifest(step, digests))


def leaves(step, rank):
    return {"x": torch.arange(50.0) + step + rank, "step": step}


def check(checkpoint, step):
    assert checkpoint.manifest.step == step
    for rank in range(checkpoint.manifest.size):
        found = checkpoint.read(rank)
        assert found["step"] == step
        assert torch.equal(found["x"], leaves(step, rank)["x"])


def names(checkpoints):
    return sorted(path.name for path in checkpoints.path.iterdir())


def test_the_newest_is_found(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() is None
    for step in (100, 20):  # the run went on from step 10, say: what was published last counts
        check(save(checkpoints, step), step)
        check(checkpoints.latest(), step)
    assert names(checkpoints) == ["latest", "step_00000020", "step_00000100"]
    assert [one.manifest.step for one in checkpoints.all()] == [20, 100]


def test_without_latest_it_is_the_highest_step(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 20)
    save(checkpoints, 10)
    for text in (None, "step_00000099\n", "../elsewhere", "\0"):
        (tmp_path / "latest").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "latest").write_text(text)
        check(checkpoints.latest(), 20)


def test_a_folder_without_manifest_is_never_chosen(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    save(checkpoints, 20)
    (tmp_path / "step_00000020" / "manifest.json").unlink()
    check(checkpoints.latest(), 10)
    assert len(checkpoints.all()) == 1


def test_the_manifest_comes_back_and_is_readable(tmp_path):
    written = save(Checkpoints(tmp_path), 7).manifest
    assert open_checkpoint(tmp_path / "step_00000007").manifest == written
    text = json.loads((tmp_path / "step_00000007" / "manifest.json").read_text())
    assert text["format"] == "mpicomp checkpoint"
    assert text["files"]["rank_00001.h5"]["nbytes"] == (tmp_path / "step_00000007" / "rank_00001.h5").stat().st_size


def test_a_step_that_is_stored_again_takes_the_place_of_the_old(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, size=3)
    save(checkpoints, 10, size=2)
    assert checkpoints.latest().manifest.size == 2
    assert names(checkpoints) == ["latest", "step_00000010"]


def test_leftovers_of_a_dead_run_are_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (checkpoints.begin(10) / "rank_00000.h5").write_text("half")
    assert checkpoints.latest() is None
    save(checkpoints, 20)
    assert names(checkpoints) == ["latest", "step_00000020"]


def test_what_is_discarded_leaves_the_others(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    checkpoints.begin(20)
    checkpoints.discard(20)
    assert names(checkpoints) == ["latest", "step_00000010"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [50]), (2, None, [40, 50]), (9, None, [10, 20, 30, 40, 50]), (1, 20, [20, 40, 50])],
)
def test_prune(tmp_path, keep_last, keep_every, kept):
    checkpoints = Checkpoints(tmp_path)
    for step in range(10, 60, 10):
        save(checkpoints, step)
    removed = checkpoints.prune(keep_last, keep_every)
    assert [one.manifest.step for one in checkpoints.all()] == kept
    assert len(removed) + len(kept) == 5
    assert not any(path.exists() for path in removed)


@pytest.mark.parametrize(("keep_last", "keep_every", "kept"), [(1, None, [25]), (2, None, [20, 25]), (1, 20, [20, 25])])
def test_after_going_back_the_new_course_is_kept_and_the_abandoned_one_removed(tmp_path, keep_last, keep_every, kept):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40, 50):
        save(checkpoints, step)
    checkpoints.go_back_to(open_checkpoint(tmp_path / "step_00000020"))
    assert len(checkpoints.all()) == 5  # until the new course has one of its own, another may be chosen
    save(checkpoints, 25)
    checkpoints.prune(keep_last, keep_every)
    assert [one.manifest.step for one in checkpoints.all()] == kept
    check(checkpoints.latest(), 25)


class Crash(BaseException):
    """Not an error that anyone may catch."""


def crash(monkeypatch, at, run):
    """Stop `run` before its change number `at` of the file system; return whether it came to its end."""
    left = [at]

    def crashing(operation):
        def call(*arguments, **options):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return operation(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        try:
            run()
        except Crash:
            return False
    return True


@pytest.mark.parametrize("at", range(40))
def test_a_crash_at_any_moment_leaves_whole_checkpoints(tmp_path, monkeypatch, at):
    """Every change of the file system may be the last one; what is left is one checkpoint after the other, whole."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    save(checkpoints, 20)

    def run():
        save(checkpoints, 30)
        checkpoints.prune(1)

    is_done = crash(monkeypatch, at, run)
    newest = checkpoints.latest()
    check(newest, newest.manifest.step)
    assert newest.manifest.step in ([30] if is_done else [20, 30])
    for one in checkpoints.all():
        check(one, one.manifest.step)
    save(checkpoints, 40)
    check(checkpoints.latest(), 40)
    assert not [name for name in names(checkpoints) if name.startswith(".")]


@pytest.mark.parametrize("at", range(25))
def test_a_crash_while_the_only_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch, at):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10, size=3)
    is_done = crash(monkeypatch, at, lambda: save(checkpoints, 10, size=2))
    newest = checkpoints.latest()
    check(newest, 10)
    assert newest.manifest.size in ([2] if is_done else [2, 3])
    assert newest == checkpoints.all()[-1] == open_checkpoint(newest.path)
    checkpoints.begin(20)  # the run goes on
    check(checkpoints.latest(), 10)
    assert checkpoints.latest().manifest == newest.manifest
    save(checkpoints, 20)
    assert names(checkpoints) == ["latest", "step_00000010", "step_00000020"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "is not the manifest of a checkpoint of mpicomp"),
        ({"version": 9}, "was written by a newer mpicomp"),
        ({"step": 11}, "is damaged, or was edited"),
        ({"config": "lr = 1"}, "is damaged, or was edited"),
        ({"files": 3}, "is damaged"),
        ({"surplus": 3}, "is damaged"),
    ],
)
def test_a_wrong_manifest_is_named(tmp_path, change, message):
    path = save(Checkpoints(tmp_path), 10).path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=rf"manifest.json: .*{message}"):
        Checkpoints(tmp_path).latest()


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 10).path.rename(tmp_path / "step_00000011")
    with pytest.raises(CheckpointError, match=r"manifest.json: is the manifest of step 10, not of step_00000011"):
        Checkpoints(tmp_path).latest()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints").begin(1)


def test_a_manifest_of_version_1_names_no_nodes(tmp_path):
    path = save(Checkpoints(tmp_path), 10).path / "manifest.json"
    values = json.loads(path.read_text())
    values["version"] = 1
    del values["nodes"], values["sha256"]
    path.write_text(json.dumps({**values, "sha256": folder._sha256(values)}))
    assert Checkpoints(tmp_path).latest().manifest.nodes == ()
