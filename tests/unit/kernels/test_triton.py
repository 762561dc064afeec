"""Kernels for GPUs where there is none: run by Triton's interpreter."""

import pytest
import torch
from support.kernel_table import (
    TABLE,
    assert_same,
    sorted_top,
    ties_go_to_the_lowest_index,
    top_k,
    top_k_of_a_difference,
    top_k_of_awkward_vectors,
    top_k_of_parts,
    vector,
)

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs these tests on the GPU", allow_module_level=True)

from support.interpreter import like_a_gpu  # noqa: F401

from mpicomp.kernels import gpu
from mpicomp.kernels.gpu import select, select_parts

pytestmark = pytest.mark.usefixtures("like_a_gpu")

SIZES = [1, 7, 9, 1000, 4096, 8193]  # a tile has 4096 entries


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_interpreter_agrees_with_the_definitions(check, dtype):
    check(gpu, "cpu", dtype, SIZES)


@pytest.mark.parametrize("check", [top_k, top_k_of_awkward_vectors, ties_go_to_the_lowest_index, top_k_of_a_difference])
def test_long_vectors_are_sampled(check, monkeypatch):
    monkeypatch.setattr(gpu, "_LONGEST_PART", 0)
    check(gpu, "cpu", torch.float32, SIZES[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_long_parts_are_searched_by_many_programs(dtype, monkeypatch):
    monkeypatch.setattr(select_parts, "_SHORT", 0)
    top_k_of_parts(gpu, "cpu", dtype, SIZES)


@pytest.mark.parametrize(("short", "launches"), [(1000, 1), (0, 6)])
def test_many_parts_take_as_many_launches_as_one(short, launches, monkeypatch):
    monkeypatch.setattr(select_parts, "_SHORT", short)
    started, launch = [], select_parts.launch
    monkeypatch.setattr(select_parts, "launch", lambda *args, **rest: (started.append(args[0]), launch(*args, **rest)))
    x = vector(600)
    for sizes in ((600,), (10,) * 60):
        gpu.top_k_of_parts(x, None, sizes, [size // 10 for size in sizes])
    assert len(started) == 2 * launches and started[:launches] == started[launches:]


@pytest.mark.parametrize(
    ("k", "sure", "one_in"), [(1, 4, [39]), (200, 4, [39]), (200, -100, [39, 1]), (19_900, 4, [1])]
)
def test_a_sample_gives_the_bound_and_may_be_wrong(k, sure, one_in, monkeypatch):
    """With -100 it is far too high, and the bound is taken from the whole vector, as it is to keep nearly all."""
    looked_at = []
    bound = select._bound
    monkeypatch.setattr(select, "_SAMPLE", 512)
    monkeypatch.setattr(select, "_SURE", sure)
    monkeypatch.setattr(select, "_bound", lambda *args: looked_at.append(args[-1]) or bound(*args))
    x = vector(20_000)
    assert_same(select.top_k(x, None, k), sorted_top(x, k))
    assert looked_at == one_in


def test_programs_of_a_histogram_share_the_tiles(monkeypatch):
    monkeypatch.setattr(select, "_PROGRAMS", 2)
    x = vector(5 * 4096 + 1)
    assert_same(select.top_k(x, None, 2000), sorted_top(x, 2000))
