"""Checkpoints with a file for each node (``checkpoint.files = "node"``), beside those with a file for each rank."""

import shutil
import time

import h5py
import pytest
import torch
from click.testing import CliRunner
from support.runs import assert_same_checkpoint

from mpicomp.checkpoint import hdf5
from mpicomp.checkpoint.export import mean_model
from mpicomp.checkpoint.folder import Checkpoints, open_checkpoint
from mpicomp.checkpoint.saver import RunIdentity, Saver
from mpicomp.cli import main
from mpicomp.config.config import RunConfig
from mpicomp.errors import CheckpointError
from mpicomp.exchange import loopback, patience
from mpicomp.replica.resize import combine
from mpicomp.run.folder import RunFolder
from mpicomp.run.loop import train

CONFIG = """
[model]
kind = "logistic"
[topology]
node_size = 2
[algorithm]
kind = "choco"
gamma = 0.2
[compression]
kind = "topk"
ratio = 0.1
[data]
kind = "synthetic"
[optimizer]
lr = 0.1
[training]
steps = 8
batch_size = 8
[checkpoint]
every_steps = 4
keep_last = 0
"""

NAMES = {"rank": [f"rank_{rank:05d}.h5" for rank in range(4)], "node": ["node_00000.h5", "node_00001.h5"]}


def trained(folder, files, checkpoint=None):
    """Train on 4 ranks and return the checkpoints."""
    config = RunConfig.from_toml(CONFIG + f'files = "{files}"\n')
    run = RunFolder.create(folder)
    run.save_config(config)
    loopback.run(4, lambda world: train(config, world, run, checkpoint=checkpoint))
    return Checkpoints(run.checkpoints_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {files: trained(folder / files, files) for files in ("rank", "node")}


def command(*arguments):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


@pytest.mark.parametrize(("before", "after"), [("node", "node"), ("node", "rank"), ("rank", "node")])
def test_a_run_continues_bit_for_bit_from_either_layout(runs, tmp_path, before, after):
    first = open_checkpoint(runs[before].path / "step_00000004")
    last = trained(tmp_path / "run", after, first).latest()
    for one, files in ((first, before), (last, after)):
        assert sorted(path.name for path in one.path.iterdir()) == ["manifest.json", *NAMES[files]]
    assert last.manifest.step == 8
    assert_same_checkpoint(runs["rank"].latest(), last)


def test_every_reader_reads_both_layouts(runs):
    one, other = runs["rank"].latest(), runs["node"].latest()
    model, same = mean_model(one), mean_model(other)
    assert all(torch.equal(model[name], same[name]) for name in model.keys() | same.keys())
    theirs, ours = (combine(checkpoint, {"algorithm/x_hat": "sum"}, 3) for checkpoint in (one, other))
    for name in ("model/parameters", "algorithm/x_hat"):
        assert torch.equal(theirs[name], ours[name])
    assert theirs["exchange/bytes_sent"] == ours["exchange/bytes_sent"]
    assert command("diff", one.path, other.path).output == "the same: step 8, 4 ranks\n"
    assert "4 files are sound" in command("verify", one.path).output
    assert "2 files are sound" in command("verify", other.path).output
    shown = [command("show", checkpoint.path, "--rank", 3).output for checkpoint in (one, other)]
    rows = [[line for line in text.splitlines() if line.strip().startswith("algorithm/")] for text in shown]
    assert rows[0] == rows[1] != []
    assert "node_00001.h5 /rank_00003" in shown[1]


def test_damage_is_named_with_the_file_and_its_ranks(runs, tmp_path):
    one = open_checkpoint(shutil.copytree(runs["node"].latest().path, tmp_path / "step_00000008"))
    file = one.path / "node_00001.h5"
    with h5py.File(file) as opened:
        offset = opened["rank_00002/algorithm/x_hat"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[offset + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"node_00001.h5: is damaged \(SHA-256\) \(the file of ranks 2, 3\)"):
        one.read(3)
    assert one.read(1)
    result = command("verify", one.path)
    assert result.exit_code == CheckpointError.exit_code
    assert "the dataset /rank_00002/algorithm/x_hat (the file of ranks 2, 3)" in result.output
    file.unlink()
    with pytest.raises(CheckpointError, match=r"node_00001.h5: the file is missing \(the file of ranks 2, 3\)"):
        mean_model(one)


def test_a_slow_writer_is_progress(tmp_path, monkeypatch):
    write, publish = hdf5.write, Checkpoints.publish

    def slowly(function):
        def call(*arguments, **settings):
            time.sleep(0.5)
            return function(*arguments, **settings)

        return call

    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    monkeypatch.setattr(hdf5, "write", slowly(write))
    monkeypatch.setattr(Checkpoints, "publish", slowly(publish))

    def save(world):
        moves = []
        saving = Saver(world, tmp_path, RunIdentity("a", "t", "m"), 2, None, pytest.fail, moved=lambda: moves.append(1))
        saving.start(1, {"n": world.rank})
        assert saving.finish()
        saving.close()
        return len(moves)

    assert all(count >= 4 for count in loopback.run(2, save))


def test_nodes_of_unequal_size_and_a_turn_that_fails(tmp_path, monkeypatch):
    nodes, failing = ((0, 2), (1,)), []
    write_group = hdf5.write_group

    def write(path, group, *arguments, **settings):
        if group in failing:
            raise CheckpointError(f"{path}: cannot be written: No space left on device")
        return write_group(path, group, *arguments, **settings)

    monkeypatch.setattr(hdf5, "write_group", write)
    problems = []

    def save(world, step):
        saving = Saver(world, tmp_path, RunIdentity("a", "t", "m"), 2, None, problems.append, nodes)
        saving.start(
            step, {"model/x": torch.full((1000,), float(world.rank)), "n": world.rank, "empty": torch.empty(0)}
        )
        is_sound = saving.finish()
        saving.close()
        return is_sound

    assert all(loopback.run(3, save, 1))
    failing.append("/rank_00002")
    assert not any(loopback.run(3, save, 2))
    assert "step 2 could not be written, the newest is that of step 1" in problems[0]
    assert "No space left on device (on rank 2)" in problems[0]
    left = Checkpoints(tmp_path).latest()
    assert left.manifest.step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert left.verify() == []
    for rank in range(3):
        found = left.read(rank)
        assert found["n"] == rank
        assert found["model/x"].eq(rank).all()
        assert list(left.read(rank, ["n"])) == ["n"]
