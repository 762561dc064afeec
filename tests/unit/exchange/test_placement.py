"""Devices and cores of a rank, without GPU and without MPI."""

import itertools
import os
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.driver_table import Table, node

from mpicomp.errors import ConfigError
from mpicomp.exchange.loopback import run
from mpicomp.exchange.placement import (
    Driver,
    Gpu,
    assign,
    check_age,
    claim_gpu,
    core_share,
    cores_near,
    device_of,
    only_gpu,
    running_on,
    shared_gpus,
    thread_count,
)
from mpicomp.exchange.staging import _Buffers


def claim(drivers, kind="auto", allow_shared=False):
    """Return the UUIDs that the ranks have started, one driver a rank."""

    def rank(world):
        gpu = claim_gpu(world, kind, allow_shared, drivers[world.rank])
        assert drivers[world.rank].started == ([gpu.uuid] if gpu else [])
        assert device_of(gpu) == (torch.device("cuda", gpu.index) if gpu else torch.device("cpu"))
        return gpu and gpu.uuid

    return run(len(drivers), rank)


ALL = node()


@pytest.mark.parametrize(
    ("drivers", "expected"),
    {
        "all see all": ([Table(ALL) for _ in range(4)], "a0 a1 a2 a3"),
        "fewer ranks than GPUs": ([Table(ALL) for _ in range(2)], "a0 a1"),
        "a number each (srun --gpu-bind=map_gpu)": ([Table(ALL, mask) for mask in "2310"], "a2 a3 a1 a0"),
        "a UUID each": ([Table(ALL, f"GPU-a{i}") for i in (3, 1)], "a3 a1"),
        "a cgroup each (srun --gpus-per-task=1)": ([Table(ALL[i : i + 1], "0") for i in range(4)], "a0 a1 a2 a3"),
        "two each (srun --gpus-per-task=2)": ([Table(ALL, "0,1"), Table(ALL, "2,3")], "a0 a2"),
        "masks in another order": ([Table(ALL, "0,1"), Table(ALL, "1,0")], "a0 a1"),
        "the same first one": ([Table(ALL, "1,0"), Table(ALL, "1,2"), Table(ALL, "1")], "a0 a2 a1"),
        "masks by number and by UUID": ([Table(ALL, "0,1"), Table(ALL, "GPU-a0,GPU-a1")], "a0 a1"),
        "an entry that hides the rest": ([Table(ALL, "1,9,0"), Table(ALL, "0")], "a1 a0"),
        "two nodes": ([Table(node(2, name)) for name in "aabb"], "a0 a1 b0 b1"),
        "two nodes in turn (srun -m cyclic)": ([Table(node(2, name)) for name in "abab"], "a0 b0 a1 b1"),
    }.values(),
)
def test_every_rank_gets_a_gpu_of_its_own(drivers, expected):
    assert claim(drivers) == [f"GPU-{name}" for name in expected.split()]


def test_mig_instances_are_told_apart_by_their_own_uuid():
    """The UUID of the GPU around them is the same."""
    instances = {f"MIG-{i}": "a0" for i in range(2)}
    assert claim([Table(node(1), uuid, mig=instances) for uuid in instances]) == list(instances)
    with pytest.raises(ConfigError, match="ranks 0, 1 would share the GPU MIG-0"):
        claim([Table(node(1), "MIG-0", mig=instances) for _ in range(2)])
    with pytest.raises(ConfigError, match="would share the GPU GPU-a0"):  # no mask: CUDA shows each the first instance
        claim([Table(node(1)) for _ in range(2)])


def test_a_gpu_is_shared_on_request_only():
    with pytest.raises(ConfigError, match=r"ranks 0, 2 would share .*GPU-a0.*allow_shared_gpu.*on ranks 0, 2\)"):
        claim([Table(ALL, mask) for mask in ("0", "1", "0")])
    assert claim([Table(ALL, mask) for mask in ("0", "1", "0")], allow_shared=True) == ["GPU-a0", "GPU-a1", "GPU-a0"]


def test_many_ranks_share_gpus_evenly():
    """Also where the first that come may use all of them, and the last one only."""
    uuids = ["a", "b"]
    assert assign([uuids] * 5) == ["a", "b", "a", "b", "a"]
    chosen = assign([uuids, uuids, uuids, ["a"], ["a"], ["a"], []])
    assert chosen == ["b", "b", "b", "a", "a", "a", None]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), unique=True, max_size=3), min_size=1, max_size=6))
def test_no_assignment_has_fewer_ranks_on_its_fullest_gpu(seen):
    chosen = assign(seen)
    assert all(uuid in uuids if uuids else uuid is None for uuid, uuids in zip(chosen, seen, strict=True))
    options = itertools.product(*(uuids or [None] for uuids in seen))
    assert fullest(chosen) == min(map(fullest, options))


def fullest(chosen):
    return max([len(ranks) for ranks in shared_gpus(chosen).values()], default=1)


def test_the_cpu_always_works():
    class Broken(Driver):
        def properties(self):
            raise AssertionError("the GPUs were looked at")

    assert run(2, lambda world: claim_gpu(world, "cpu", driver=Broken())) == [None, None]
    assert only_gpu("cpu", Broken()) is None


def test_without_gpus_ranks_run_on_the_cpu():
    assert claim([Table([]), Table([])]) == [None, None]
    assert only_gpu("auto", Table([])) is None


REMEDIES = {
    "this torch was built without CUDA": Table([], has_cuda=False),
    r"CUDA_VISIBLE_DEVICES='' hides all of them: unset it": Table(ALL, ""),
    r"CUDA_VISIBLE_DEVICES='-1' hides .*--gpus-per-task": Table(ALL, "-1", environ={"SLURM_JOB_ID": "7"}),
    r"CUDA_VISIBLE_DEVICES='7,0' begins with one that is not there": Table(ALL, "7,0"),
    r"Slurm gave this step none.*--gpus-per-task": Table([], environ={"SLURM_JOB_ID": "7"}),
    r"try nvidia-smi": Table([]),
}


@pytest.mark.parametrize(("remedy", "driver"), REMEDIES.items())
def test_a_gpu_that_is_missing_is_an_error_with_its_remedy(remedy, driver):
    with pytest.raises(ConfigError, match=rf"this rank sees no GPU: .*{remedy}.*run.device=cpu.*\(on rank 1\)"):
        claim([Table(ALL, "0"), driver], "cuda")
    is_hidden = "hides" in remedy  # on purpose: a hub may be on the CPU
    error = pytest.raises(ConfigError, match=rf"sees no GPU, but 1 other.*{remedy}.*run.device=cpu.*\(on rank 1\)")
    with nullcontext() if is_hidden else error:
        assert claim([Table(ALL, "0"), driver], "auto") == ["GPU-a0", None]


def test_a_full_gpu_is_an_error_on_its_rank():
    drivers = [Table(ALL, free={"GPU-a1": 100_000_000}) for _ in range(3)]
    with pytest.raises(ConfigError, match=r"GPU-a1 \(H100\) is full: 100 MB of .*run.device=cpu.*\(on rank 1\)"):
        claim(drivers)


@pytest.mark.parametrize("kind", ["auto", "cuda"])
def test_a_gpu_that_does_not_start_is_an_error_on_its_rank(kind):
    busy = RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with ...")
    drivers = [Table(ALL, broken={"GPU-a0": busy}), Table(ALL, "1")]
    with pytest.raises(ConfigError, match=r"GPU-a0 .* cannot be used: .* busy or unavailable\. .*\(on rank 0\)"):
        claim(drivers, kind)


def test_a_driver_that_does_not_start_is_an_error_on_its_rank():
    class Old(Table):
        def properties(self):
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    with pytest.raises(ConfigError, match=r"CUDA does not start: .*11040\)\. .*run.device=cpu.*\(on rank 1\)"):
        claim([Table(ALL), Old(ALL)])


def test_one_process_takes_the_first_gpu():
    assert only_gpu("auto", Table(ALL, "2,1")).uuid == "GPU-a2"
    with pytest.raises(ConfigError, match="sees no GPU"):
        only_gpu("cuda", Table([]))


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),  # the binary of an older one of the same major version
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled as it is loaded
        ((8, 0), ["sm_90", "compute_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_90a", "sm_100a"], False),
        ((12, 1), ["sm_120"], True),
        ((9, 0), [], True),  # torch does not say
    ],
)
def test_a_gpu_must_not_be_too_old_for_torch(capability, compiled, runs):
    gpu = Gpu(0, "GPU-1", "X", capability)
    with nullcontext() if runs else pytest.raises(ConfigError, match="this torch was compiled for sm_"):
        check_age(gpu, compiled, has_triton=False)


def test_a_gpu_must_not_be_too_old_for_triton():
    old = Gpu(0, "GPU-1", "V100", (7, 0))
    check_age(old, ["sm_70"], has_triton=False)
    with pytest.raises(ConfigError, match=r"capability 7\.0, .*Triton need 8\.0: set MPICOMP_KERNELS=reference"):
        check_age(old, ["sm_70"], has_triton=True)


def test_cores_near_a_gpu_are_those_of_its_slot(tmp_path):
    for slot, uuid, cores in (("0000:1b:00.0", "GPU-1", "0-3,8-11\n"), ("0000:9c:00.0", "GPU-2", "4-7,12\n")):
        for folder, name, text in (
            (f"proc/driver/nvidia/gpus/{slot}", "information", f"Model: \t H100\nGPU UUID: \t {uuid}\n"),
            (f"sys/bus/pci/devices/{slot}", "local_cpulist", cores),
        ):
            (tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / name).write_text(text)
    assert cores_near("GPU-1", tmp_path) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert cores_near("GPU-2", tmp_path) == {4, 5, 6, 7, 12}
    assert cores_near("GPU-3", tmp_path) is None
    (tmp_path / "sys/bus/pci/devices/0000:1b:00.0/local_cpulist").unlink()
    assert cores_near("GPU-1", tmp_path) is None


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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no threads")
def test_buffers_are_allocated_from_cores_near_the_gpu(monkeypatch):
    allowed, bound = os.sched_getaffinity(0), []
    empty = torch.empty

    def recorded(*shape, pin_memory=False, **options):
        bound.append((pin_memory, os.sched_getaffinity(0)))
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    near = {max(allowed)}
    buffers = _Buffers(torch.device("cpu"), is_pinned=True, cores=near)
    buffers.get(0, 10)
    buffers.get(0, 5)
    assert bound == [(True, near)]
    assert os.sched_getaffinity(0) == allowed

    for cores in (None, {4095}):  # not known; not there
        with running_on(cores):
            assert os.sched_getaffinity(0) == allowed
    with pytest.raises(KeyError), running_on(near):
        raise KeyError
    assert os.sched_getaffinity(0) == allowed
