"""Devices and cores of a rank, without GPU and without MPI."""

import pytest
import torch

from mpicomp.errors import ConfigError
from mpicomp.exchange.placement import choose_device, core_share, shared_gpus, thread_count


@pytest.mark.parametrize(
    ("kind", "local_rank", "visible", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 3, 0, "cpu"),
        ("cpu", 1, 8, "cpu"),
        ("auto", 2, 4, "cuda:2"),
        ("cuda", 0, 4, "cuda:0"),
        ("auto", 0, 1, "cuda:0"),
        ("auto", 3, 1, "cuda:0"),  # bound by the launcher, one GPU to each rank
        ("auto", 5, 4, "cuda:1"),
    ],
)
def test_device_of_a_rank(kind, local_rank, visible, expected):
    assert choose_device(kind, local_rank, visible) == torch.device(expected)


def test_a_gpu_that_is_demanded_must_be_there():
    with pytest.raises(ConfigError, match="device = 'cuda', but torch sees no GPU"):
        choose_device("cuda", 0, 0)


def test_ranks_that_share_a_gpu_are_found_by_its_uuid():
    assert shared_gpus(["a", "b", "a", None, None, "c", "a"]) == {"a": [0, 2, 6]}
    assert shared_gpus([None, None]) == {}
    assert shared_gpus(["a", "b"]) == {}


@pytest.mark.parametrize(
    ("mine", "local", "expected"),
    [
        ({0, 1}, [{0, 1}], 2),
        ({0, 1}, [{0, 1}] * 2, 1),
        ({0, 1}, [{0, 1}] * 8, 0.25),
        ({0}, [{0}, {1}], 1),
        ({0}, [{0}, {0}], 0.5),  # both bound to the same core, though another one is idle
        ({0, 1}, [{0}, {0, 1}], 1.5),
        (set(range(64)), [set(range(64))] * 4, 16),
    ],
)
def test_cores_are_split_between_the_ranks_allowed_on_them(mine, local, expected):
    assert core_share(mine, local) == pytest.approx(expected)


@pytest.mark.parametrize(("share", "expected"), [(0.25, 1), (1, 1), (1.5, 1), (16, 16), (sum([1 / 3] * 9), 3)])
def test_threads_follow_the_share(share, expected):
    assert thread_count(share, {}) == expected


@pytest.mark.parametrize(("wish", "expected"), [("3", 3), ("0", 8), ("4,2", 8), ("", 8)])
def test_threads_set_by_the_user_are_obeyed(wish, expected):
    assert thread_count(8, {"OMP_NUM_THREADS": wish}) == expected
