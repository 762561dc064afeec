"""Kernels for GPUs where there is none: run by Triton's interpreter, and compiled without being run."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.kernel_table import TABLE, assert_same, sorted_top, vector

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs these tests on the GPU", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mpicomp.kernels import gpu
from mpicomp.kernels.cpu.compiled import compiled, fused
from mpicomp.kernels.gpu import select, select_parts

SIZES = [1, 7, 9, 1000, 4096, 8193]  # a tile has 4096 entries


@compiled
def fused_each(a, b, c, out):
    for i in range(len(out)):
        out[i] = fused(a[i], b[i], c[i])


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """Round a fused multiply-add once, and overflow in silence: the interpreter does neither."""

    def create_fma(self, x, y, z):
        out = np.empty(np.broadcast_shapes(x.data.shape, y.data.shape, z.data.shape), z.data.dtype)
        fused_each(*(np.broadcast_to(part.data, out.shape).ravel() for part in (x, y, z)), out.reshape(-1))
        return TensorHandle(out, z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_interpreter_agrees_with_the_definitions(check, dtype):
    check(gpu, "cpu", dtype, SIZES)


def test_many_parts_take_as_many_launches_as_one(monkeypatch):
    started, launch = [], select_parts.launch
    monkeypatch.setattr(select_parts, "launch", lambda *args, **rest: (started.append(args[0]), launch(*args, **rest)))
    x = vector(600)
    for sizes in ((600,), (10,) * 60):
        gpu.top_k_of_parts(x, None, sizes, [size // 10 for size in sizes])
    assert started[: len(started) // 2] == started[len(started) // 2 :]


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
    assert_same(gpu.top_k(x, k), sorted_top(x, k))
    assert looked_at == one_in


def test_programs_of_a_histogram_share_the_tiles(monkeypatch):
    monkeypatch.setattr(select, "_PROGRAMS", 2)
    x = vector(5 * 4096 + 1)
    assert_same(gpu.top_k(x, 2000), sorted_top(x, 2000))


def test_kernels_compile_for_a_gpu(tmp_path):
    """By the compiler itself, which is stricter than the interpreter, and needs no GPU."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    del environment["TRITON_INTERPRET"]
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= {"_histogram", "_pick", "_count", "_emit", "_fold", "quantize", "_find_bits"}
