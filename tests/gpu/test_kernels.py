"""The kernels in Triton on a real GPU: the table that the interpreter runs elsewhere, on longer vectors as well."""

import pytest
import torch
from support.kernel_table import TABLE, assert_same, vector

from mpicomp import kernels
from mpicomp.kernels import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device that torch can use"),
]

SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 1000, 4095, 4096, 4097, 2**16 - 1, 2**16 + 1, 272_474]
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def gpu():
    pytest.importorskip("triton")
    return kernels.compiled("cuda")


@pytest.mark.parametrize("check", TABLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gpu_agrees_with_the_definitions(gpu, check, dtype):
    check(gpu, DEVICE, dtype, SIZES)


def test_a_long_vector(gpu):
    """With a sample, and more tiles than there are programs for a histogram."""
    x = vector(11_000_000)
    for k in (0, 1, 11_000, 110_000, 1_100_000, 10_900_000, 11_000_000):
        assert_same(kernels.top_k(x.to(DEVICE), k), kernels.top_k(x, k))
    assert_same(kernels.norm(x.to(DEVICE)), reference.norm(x))


def test_a_tensor_on_a_gpu_gets_its_version(gpu, monkeypatch):
    called = []
    monkeypatch.setattr(gpu, "pack_signs", lambda x: called.append(x))
    x = torch.ones(16, device=DEVICE)
    kernels.pack_signs(x)
    kernels.pack_signs(x.half())
    kernels.pack_signs(x[::2])
    assert len(called) == 1 and called[0] is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_take_the_definition(dtype):
    x = vector(1001, dtype)
    assert_same(kernels.top_k(x.to(DEVICE), 100), reference.top_k(x, 100))
