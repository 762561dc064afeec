"""``mpicomp checkpoint`` on the checkpoints of a small run."""

import shutil

import h5py
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support import tied

from mpicomp.cli import main
from mpicomp.cli.checkpoint import _difference
from mpicomp.exchange import loopback

CONFIG = """
[model]
kind = "logistic"
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
steps = 12
batch_size = 8
[checkpoint]
every_steps = 4
keep_last = 0
"""


def run(*arguments):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "small.toml").write_text(CONFIG)
    command = ["train", str(folder / "small.toml"), "--loopback", "3", "--run-dir", str(folder / "run")]
    assert CliRunner().invoke(main, command).exit_code == 0
    return folder / "run"


@pytest.fixture
def trained(original, tmp_path):
    return shutil.copytree(original, tmp_path / "run")


def step(folder, number):
    return folder / "checkpoints" / f"step_{number:08d}"


def flip(file, name):
    """Change a byte of a dataset."""
    with h5py.File(file) as opened:
        offset = opened[name].id.get_offset()
    with file.open("r+b") as opened:
        opened.seek(offset + 5)
        old = opened.read(1)
        opened.seek(offset + 5)
        opened.write(bytes([old[0] ^ 1]))


def test_ls_lists_all_of_them(trained):
    lines = run("ls", trained).output.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "4", "8", "12"]
    assert lines[1].endswith("Choco, TopK") or "Choco, TopK  " in lines[1]


def test_verify_names_file_and_dataset(trained):
    assert run("verify", trained).exit_code == 0
    flip(step(trained, 8) / "rank_00001.h5", "algorithm/x_hat")
    result = run("verify", trained)
    assert result.exit_code == 6
    assert f"{step(trained, 4)}: 3 files are sound" in result.output
    assert f"{step(trained, 8)}: damaged" in result.output
    assert "rank_00001.h5: is damaged (SHA-256): the dataset /algorithm/x_hat" in result.output
    assert result.output.count("rank_0000") == 1


def test_verify_says_when_no_dataset_is_damaged(trained):
    file = step(trained, 12) / "rank_00000.h5"
    content = file.read_bytes()
    file.write_bytes(content.replace(b"mpicomp checkpoint", b"mpicomp checkpoinT"))
    assert "is damaged (SHA-256)" in run("verify", step(trained, 12)).output


def test_show_lists_names_types_and_norms(trained):
    result = run("show", trained, "--rank", 2)
    assert result.exit_code == 0
    assert "step       12" in result.output
    row = next(line for line in result.output.splitlines() if "model/parameters" in line)
    with h5py.File(step(trained, 12) / "rank_00002.h5") as file:
        norm = torch.from_numpy(file["model/parameters"][()]).double().norm()
        assert str(len(file["model/parameters"])) in row
    assert f"{float(norm):.6g}" in row
    assert "float32" in row
    assert "has the ranks 0 to 2" in run("show", trained, "--rank", 3).output


def test_diff_finds_what_differs(trained):
    same = run("diff", trained, step(trained, 12))
    assert (same.exit_code, same.output) == (0, "the same: step 12, 3 ranks\n")
    other = run("diff", trained, step(trained, 8))
    assert other.exit_code == 1
    assert "step: 12 and 8" in other.output
    assert "rank 2: model/parameters: " in other.output


def test_prune_keeps_the_newest_and_multiples(trained):
    assert run("prune", trained, "--keep-last", 1, "--keep-every", 8).output == "removed 1: step_00000004\n"
    assert run("verify", trained).output.count("are sound") == 2
    flip(step(trained, 12) / "rank_00001.h5", "model/parameters")
    refused = run("prune", trained)
    assert refused.exit_code == 6
    assert "nothing is removed" in refused.output
    assert step(trained, 8).exists()


def test_a_damaged_manifest_hides_no_other_checkpoint(trained):
    (step(trained, 12) / "manifest.json").write_text("{")
    listed = run("ls", trained)
    assert [line.split()[0] for line in listed.output.splitlines()[:3]] == ["step", "4", "8"]
    assert "manifest.json: is damaged" in listed.output
    result = run("verify", trained)
    assert result.exit_code == 6
    assert result.output.count("3 files are sound") == 2
    assert f"{step(trained, 12)}: damaged" in result.output


def test_verify_needs_a_checkpoint(trained):
    shutil.rmtree(trained / "checkpoints")
    assert run("verify", trained).exit_code == 6
    assert run("ls", trained).exit_code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_export_gives_the_averaged_model_of_the_run(trained, tmp_path, name):
    assert run("export", trained, tmp_path / name).exit_code == 0
    read = load_file if name.endswith("safetensors") else torch.load
    exported = read(tmp_path / name)
    with h5py.File(trained / "model.h5") as file:
        assert set(exported) == set(file["parameters"])
        for parameter, tensor in exported.items():
            assert torch.equal(tensor, torch.from_numpy(file["parameters"][parameter][()]))


@pytest.fixture
def with_extra(tmp_path):
    """The checkpoint of a script of one's own, and one that differs in what is the script's."""

    def serve(world):
        gossip = tied.train(world)
        extra = {"scheduler": {"_schedulers": [{"lr_lambdas": [None]}], "last_epoch": 3}, "a/b": {1: torch.ones(2, 2)}}
        gossip.save(tmp_path / "one", extra=extra)
        extra["scheduler"]["last_epoch"] = 4
        extra["a/b"][1][0, 0] = -1
        gossip.save(tmp_path / "other", extra=extra)

    loopback.run(2, serve)
    return tmp_path / "one", tmp_path / "other"


def test_show_lists_what_is_the_scripts_own(with_extra):
    result = run("show", with_extra[0])
    assert result.exit_code == 0
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if "extra/" in line}
    assert rows["extra/['a%2Fb'][1]"] == ["2x2", "float32", "16", "B", "2"]
    assert rows["extra/structure"][1] == "str"
    aliases = next(line for line in result.output.splitlines() if "model/aliases" in line)
    assert '{"again.weight": "middle.weight"' in aliases


def test_diff_shows_where_what_is_the_scripts_own_differs(with_extra):
    result = run("diff", *with_extra)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["extra/['a%2Fb'][1]", "extra/structure"] * 2
    assert lines[0].endswith("1 of 4 entries differ, by at most 2")
    assert '"last_epoch", 3]' in lines[1] and '"last_epoch", 4]' in lines[1]


def test_verify_names_what_is_the_scripts_own(with_extra):
    assert run("verify", with_extra[0]).output.count("2 files are sound") == 1
    flip(with_extra[0] / "step_00000003" / "rank_00001.h5", "extra/['a%2Fb'][1]")
    result = run("verify", with_extra[0])
    assert result.exit_code == 6
    assert "rank_00001.h5: is damaged (SHA-256): the dataset /extra/['a%2Fb'][1]" in result.output


def test_export_counts_tied_weights_once(with_extra, tmp_path):
    output = run("export", with_extra[0], tmp_path / "model.safetensors").output
    parameters = 7 * 4 + 2 * 4 + (4 * 4 + 4) + 7
    assert f": 9 tensors, {parameters + 2 * 4 + 1} entries; the mean of 2 ranks at step 3" in output


@pytest.mark.parametrize(
    ("left", "right", "shown"),
    [
        ("equal " * 20 + "a b", "equal " * 20 + "c", "...l equal equal equal a b and ...l equal equal equal c"),
        ("a", "b", "a and b"),
        (1, 2, "1 and 2"),
        (torch.tensor([1j]), torch.tensor([3j]), "1 of 1 entries differ, by at most 2"),
    ],
)
def test_differences_of_leaves(left, right, shown):
    assert _difference(left, right) == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{}/none"], "has no checkpoint"),
        (["show", "{}/none"], "has no checkpoint"),
        (["verify", "{}/none"], "has no checkpoint: there is no such folder"),
        (["verify", "{}/checkpoints/step_00000099"], "is not a checkpoint: it has no manifest.json"),
        (["export", "{}", "{}/model.h5"], "the name must end in one of .safetensors, .pt, .pth"),
    ],
)
def test_mistakes(trained, arguments, message):
    result = run(*(argument.format(trained) for argument in arguments))
    assert message in result.output
    assert result.exit_code != 0
