"""Bytes that each operation on a GPU reads and writes, counted in Triton's interpreter, beside those that it must."""

from functools import partial

import numpy as np
import pytest
import torch
from support.kernel_table import SCALE, chosen, one, table_of_blocks, vector
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is tried where there is no GPU", allow_module_level=True)

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from mpicomp.kernels import gpu
from mpicomp.kernels.gpu import select
from mpicomp.kernels.reference import packed_nbytes

N = 300_000
K = N // 100
FREE = {"view", "alias", "slice", "select", "detach", "empty", "new_empty", "unbind", "as_strided"}


class Counted(TorchDispatchMode):
    """Counts the bytes that torch's own operations read and write."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in FREE:
            reads = [] if name in ("zeros", "full", "fill_", "arange") else tree_leaves(args)
            leaves = [leaf for leaf in (*reads, *tree_leaves(out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(leaf.nbytes for leaf in leaves)
        return out


@pytest.fixture
def moved(monkeypatch):
    """Return a function that counts the bytes of a call."""
    kernels = [0]

    def note(name, at):
        original = getattr(InterpreterBuilder, name)

        def counted(self, *args):
            pointers, mask = args[0], args[at]
            kernels[0] += int(np.sum(mask.data)) * (pointers.get_element_ty().primitive_bitwidth // 8)
            return original(self, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    note("create_masked_load", 1)
    note("create_masked_store", 2)
    atomic = InterpreterBuilder.create_atomic_rmw

    def counted(self, operation, pointers, values, mask, *rest):
        kernels[0] += 2 * int(np.sum(mask.data)) * values.data.itemsize
        return atomic(self, operation, pointers, values, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", counted)
    run = GridExecutor.__call__

    def run_uncounted(self, *args, **kwargs):
        with _disable_current_modes():  # the interpreter copies its arguments to the host and back
            run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", run_uncounted)

    def count(call):
        kernels[0] = 0
        with Counted() as torchs:
            call()
        return kernels[0] + torchs.bytes

    with np.errstate(all="ignore"):
        yield count


def cases():
    """Return a call of each operation, and the bytes of its arguments and results in float32."""
    x, y, z, v = (vector(N, seed=seed) for seed in range(4))
    sizes = (N // 4, 16, N - N // 4 - 16)
    values, indices = x[:K].clone(), chosen(N, K)
    code, signs, levels = gpu.encode_indices(indices, N), gpu.pack_signs(x), gpu.quantize(x, one(0.1), 4, 1)
    middles, grid = [0.25, 0.5, 1.0], [0.0, 0.3, 0.7, 1.0]
    places = gpu.round_to_grid(x, one(1.0), middles, 3)
    threshold = float(x.abs().sort().values[N - K])
    _, table, _ = table_of_blocks([N], 0.01)
    table, total = table[: -(-N // 4096)], int(table[: -(-N // 4096), 4].sum())
    _, block_places = gpu.top_k_of_blocks(x, None, table, total)
    packed_places = gpu.pack_codes(block_places, 12)
    vectors = 4 * N
    top = vectors + 8 * K
    return {
        "top_k": (partial(gpu.top_k, x, K), top),
        "top_k, sampled": (partial(select.top_k, x, None, K), top),
        "top_k_of_difference": (partial(gpu.top_k_of_difference, x, y, K), top + vectors),
        "top_k_of_difference, sampled": (partial(select.top_k, x, y, K), top + vectors),
        "top_k_of_parts": (partial(gpu.top_k_of_parts, x, None, sizes, [s // 100 for s in sizes]), top),
        "top_k_of_blocks": (partial(gpu.top_k_of_blocks, x, None, table, total), vectors + 6 * total + table.nbytes),
        "pack_codes": (partial(gpu.pack_codes, block_places, 12), 2 * total + len(packed_places)),
        "block_indices": (partial(gpu.block_indices, packed_places, table, 12, total), 4 * total + len(packed_places)),
        "above": (partial(gpu.above, x, threshold), top),
        "scatter_add_": (partial(gpu.scatter_add_, x, indices, values), 16 * K),
        "add_block_": (partial(gpu.add_block_, x, indices[:1], values), 12 * K),
        "encode_indices": (partial(gpu.encode_indices, indices, N), 4 * K + len(code)),
        "decode_indices": (partial(gpu.decode_indices, code, K, N), 4 * K + len(code)),
        "mix_": (partial(gpu.mix_, x, y, z, 0.1), 4 * vectors),
        "adaptive_mix_": (partial(gpu.adaptive_mix_, x, y, z, v.abs(), 0.1, 0.9, 0.1, 1e-8, 1.0), 6 * vectors),
        "mean_magnitude": (partial(gpu.mean_magnitude, x), vectors),
        "norm": (partial(gpu.norm, x), vectors),
        "noise": (partial(gpu.noise, x, 1), vectors),
        "random_indices": (partial(gpu.random_indices, torch.tensor([1]), N, K), 4 * K),
        "quantize": (partial(gpu.quantize, x, one(0.1), 4, 1), vectors + packed_nbytes(N, 5)),
        "add_quantized_": (partial(gpu.add_quantized_, x, levels, 4, SCALE), 2 * vectors + packed_nbytes(N, 5)),
        "round_to_grid": (partial(gpu.round_to_grid, x, one(1.0), middles, 3), vectors + packed_nbytes(N, 3)),
        "add_gridded_": (partial(gpu.add_gridded_, x, places, grid, 3, SCALE), 2 * vectors + packed_nbytes(N, 3)),
        "pack_signs": (partial(gpu.pack_signs, x), vectors + packed_nbytes(N, 1)),
        "add_signs_": (partial(gpu.add_signs_, x, signs, SCALE), 2 * vectors + packed_nbytes(N, 1)),
    }


MOST = {
    "top_k": 6.6,  # a pass for each 8 bits of the threshold, and two; and histograms for every tile, out of the cache
    "top_k_of_difference": 6.6,
    "top_k, sampled": 2.5,  # two passes, and a sample: of more than 4 million entries
    "top_k_of_difference, sampled": 2.5,
    "top_k_of_parts": 6.6,
    "block_indices": 5.0,  # bits of a byte are read one by one, out of the cache
    "pack_codes": 1.02,
    "above": 2.0,  # to count, and to write
    "encode_indices": 8.5,
    "decode_indices": 10.0,
    "add_gridded_": 1.5,  # the table, for every entry, which comes out of the cache
}
"""How many times as many bytes as the floor; the others move just that, and a thousandth more for sums and tables."""


def test_bytes_moved_are_near_the_floor(moved):
    """Run with -s to see the table."""
    calls = cases()
    assert set(MOST) < set(calls)
    found = {name: moved(call) / floor for name, (call, floor) in calls.items()}
    for name, ratio in found.items():
        print(f"| {name} | {calls[name][1] / 4 / N:.2f} | {ratio:.2f} |")
    for name, ratio in found.items():
        assert 1 <= ratio <= MOST.get(name, 1.01), name
