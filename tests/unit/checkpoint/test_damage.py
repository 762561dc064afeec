"""Some hundreds of random damages: each is detected, with its file named, or changes nothing."""

import random
import shutil
import signal
import sys

import h5py
import pytest
import torch

from mpicomp.checkpoint import damage, hdf5
from mpicomp.checkpoint.folder import Checkpoints, Manifest, rank_file
from mpicomp.errors import CheckpointError

DAMAGES = 400


def leaves(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(3000, generator=generator)
    return {"model/parameters": x, "half": x[:500].bfloat16(), "matrix": x.view(30, 100), "steps": step, "text": "abc"}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("original"))
    for step in (10, 20):
        folder = checkpoints.begin(step)
        digests = [hdf5.write(folder / rank_file(rank), leaves(step, rank), {"rank": rank}) for rank in range(2)]
        files = {rank_file(rank): digest for rank, digest in enumerate(digests)}
        checkpoints.publish(Manifest(step, 2, "DPSGD()", "ring", "Linear", "", {"torch": "2"}, "now", None, files))
    return checkpoints.path


def flip(draw, file, others):
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 3, 50])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(draw, file, others):
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def blank(draw, file, others):
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice([1, 8, 512, 4096]))
    content[start:stop] = bytes(stop - start)
    file.write_bytes(content)


def extend(draw, file, others):
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.choice([1, 100])))


def exchange(draw, file, others):
    file.write_bytes(draw.choice(others).read_bytes())


def remove(draw, file, others):
    file.unlink()


@pytest.mark.parametrize("part", range(4))
def test_damage_is_detected_or_harmless(tmp_path, original, part):
    detected = 0
    for number in range(part, DAMAGES, 4):
        draw = random.Random(number)
        folder = shutil.copytree(original, tmp_path / str(number))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        file = draw.choice(files)
        draw.choice([flip, flip, cut, blank, extend, exchange, remove])(draw, file, files)
        try:
            latest = Checkpoints(folder).latest()
            found = [latest.read(rank) for rank in range(2)]
        except CheckpointError as error:
            assert str(folder) in str(error)
            detected += 1
        else:
            step = latest.manifest.step
            for rank, state in enumerate(found):
                expected = leaves(step, rank)
                assert state.keys() == expected.keys(), f"damage {number}"
                for name, leaf in expected.items():
                    same = torch.equal(leaf, state[name]) if isinstance(leaf, torch.Tensor) else leaf == state[name]
                    assert same, f"damage {number}: {name}"
        shutil.rmtree(folder)
    assert detected > DAMAGES / 4 / 5


DATASETS = {
    "model/parameters": torch.linspace(-1, 1, 3000),
    "model/half": torch.linspace(-1, 1, 500).bfloat16(),
    "model/matrix": torch.randn(30, 100),
    "model/long": torch.randn(300_000),
    "model/scalar": torch.tensor(0.1234),
    "steps": 1234567,
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rank_00000.h5"


def place(file, name):
    """Return the positions of the bytes of a tensor."""
    with h5py.File(file) as opened:
        dataset = opened[name].id
        return range(dataset.get_offset(), dataset.get_offset() + dataset.get_storage_size())


def flip_bit(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def test_a_sound_file_has_no_damage(file):
    assert damage.damaged(file, hdf5.write(file, DATASETS, {})) == []


def test_the_damaged_datasets_are_named(file):
    digest = hdf5.write(file, DATASETS, {})
    flip_bit(file, place(file, "model/half")[0])
    flip_bit(file, place(file, "model/long")[7])
    flip_bit(file, place(file, "model/long")[-1])
    named = [f"{file}: is damaged (SHA-256): the dataset /{name}" for name in ("model/half", "model/long")]
    assert damage.damaged(file, digest) == named


@pytest.mark.parametrize("name", [name for name, leaf in DATASETS.items() if isinstance(leaf, torch.Tensor)])
def test_without_a_digest_the_checksums_find_a_flipped_bit(file, name):
    hdf5.write(file, DATASETS, {})
    positions, content = place(file, name), file.read_bytes()
    draw = random.Random(name)
    for _ in range(20):
        wrong = bytearray(content)
        wrong[draw.choice(positions)] ^= 1 << draw.randrange(8)
        file.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=rf"rank_00000.h5: the dataset /{name} is damaged"):
            hdf5.read(file)
        others = [other for other in DATASETS if other != name]
        assert hdf5.read(file, names=others).keys() == set(others)


def test_other_damages_are_told_apart(file):
    digest = hdf5.write(file, DATASETS, {})
    content = file.read_bytes()
    number = (1234567).to_bytes(8, "little")
    assert content.count(number) == 1
    file.write_bytes(content.replace(number, (1234568).to_bytes(8, "little")))
    (sentence,) = damage.damaged(file, digest)
    assert "outside of all tensors" in sentence
    file.write_bytes(content[:-7])
    (sentence,) = damage.damaged(file, digest)
    assert sentence == f"{file}: is cut off: {len(content) - 7:,} bytes instead of {len(content):,}"
    file.unlink()
    assert damage.damaged(file, digest) == [f"{file}: the file is missing"]


def test_a_damaged_header_is_told(file):
    digest = hdf5.write(file, DATASETS, {})
    content = file.read_bytes()
    file.write_bytes(content[:8] + bytes(40) + content[48:])
    (sentence,) = damage.damaged(file, digest)
    assert sentence.startswith(f"{file}: is damaged (SHA-256): the damage is outside of all tensors")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 11)", f"HDF5 crashes on it (exit code {-signal.SIGSEGV})"),
        ("import time; time.sleep(60)", "HDF5 does not come to an end with it"),
    ],
)
def test_hdf5_may_crash_on_damage(file, tmp_path, monkeypatch, program, message):
    digest = hdf5.write(file, DATASETS, {})
    flip_bit(file, place(file, "model/half")[0])
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{program}\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(damage, "_START_S", 1)
    (sentence,) = damage.damaged(file, digest)
    assert sentence.endswith(message)
