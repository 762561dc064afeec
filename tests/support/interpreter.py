"""Triton's interpreter as a GPU rounds: its fused multiply-add rounds twice, and it warns of an overflow."""

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from mpicomp.kernels.cpu.compiled import compiled, fused


@compiled
def fused_each(a, b, c, out):
    for i in range(len(out)):
        out[i] = fused(a[i], b[i], c[i])


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Round a fused multiply-add once, and overflow in silence."""

    def create_fma(self, x, y, z):
        out = np.empty(np.broadcast_shapes(x.data.shape, y.data.shape, z.data.shape), z.data.dtype)
        fused_each(*(np.broadcast_to(part.data, out.shape).ravel() for part in (x, y, z)), out.reshape(-1))
        return TensorHandle(out, z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)
    with np.errstate(all="ignore"):
        yield
