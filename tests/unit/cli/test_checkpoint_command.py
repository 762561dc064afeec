"""``mpicomp checkpoint`` on the checkpoints of a small run."""

import shutil

import h5py
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mpicomp.cli import main

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
        offset = opened[name].id.get_chunk_info(0).byte_offset
    with file.open("r+b") as opened:
        opened.seek(offset + 5)
        old = opened.read(1)
        opened.seek(offset + 5)
        opened.write(bytes([old[0] ^ 1]))


def test_ls_lists_all_of_them(trained):
    lines = run("ls", trained).output.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "4", "8", "12"]
    assert "Choco(gamma=0.2" in lines[1]


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


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_export_gives_the_averaged_model_of_the_run(trained, tmp_path, name):
    assert run("export", trained, tmp_path / name).exit_code == 0
    read = load_file if name.endswith("safetensors") else torch.load
    exported = read(tmp_path / name)
    with h5py.File(trained / "model.h5") as file:
        assert set(exported) == set(file["parameters"])
        for parameter, tensor in exported.items():
            assert torch.equal(tensor, torch.from_numpy(file["parameters"][parameter][()]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "{}/none"], "has no checkpoint"),
        (["show", "{}/none"], "has no checkpoint"),
        (["verify", "{}/checkpoints/step_00000099"], "is not a checkpoint: it has no manifest.json"),
        (["export", "{}", "{}/model.h5"], "the name must end in one of .safetensors, .pt, .pth"),
    ],
)
def test_mistakes(trained, arguments, message):
    result = run(*(argument.format(trained) for argument in arguments))
    assert message in result.output
