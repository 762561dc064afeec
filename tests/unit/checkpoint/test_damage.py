"""Some hundreds of random damages: each is detected, with its file named, or changes nothing."""

import random
import shutil

import pytest
import torch

from mpicomp.checkpoint import hdf5
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
