"""Block top-k and statistical values, against transcriptions in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.compression import BlockTopK, ErrorFeedback, PerTensor, Spec, TopK
from mpicomp.compression.values import read_values, write_values
from mpicomp.errors import ConfigError, DivergenceError

SHAPES = ((70, 130), (130,), (10, 1), (3, 5, 2, 3), (), (0, 4), (64, 64), (5000,))


def spec_of(shapes, dtype=torch.float32):
    return Spec(tuple(f"p{i}" for i in range(len(shapes))), shapes, dtype)


def vector(n, dtype=torch.float32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparsified(tensor, ratio, block):
    """Cut a tensor by slices, sort each block, and keep the first of it."""
    out, sides = np.zeros_like(tensor), [side for side in tensor.shape if side != 1]
    if not tensor.size:
        return out
    if len(sides) < 2:
        flat, kept = tensor.reshape(1, -1), out.reshape(1, -1)
        height, width = 1, block
    else:
        flat, kept = tensor.reshape(sides[0], -1), out.reshape(sides[0], -1)
        height = width = math.isqrt(block)
    for top in range(0, flat.shape[0], height):
        for left in range(0, flat.shape[1], width):
            piece = flat[top : top + height, left : left + width]
            k = max(1, int(piece.size * ratio + 1e-9))
            chosen = np.argsort(-np.abs(piece.ravel()), kind="stable")[:k]
            rows, columns = np.unravel_index(chosen, piece.shape)
            kept[top + rows, left + columns] = piece[rows, columns]
    return out


def through_the_wire(compressor, x, spec):
    payload, layout = compressor.compress(x, spec, None), compressor.layout(spec)
    wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
    assert layout.pack(payload, wire) == layout.nbytes  # always of the same length
    return compressor.decompress(layout.unpack(wire), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("ratio", "block"), [(0.03, 4096), (0.2, 4096), (0.1, 100), (0.5, 1), (1.0, 70)])
def test_the_largest_entries_of_each_block_are_kept(ratio, block, dtype):
    spec = spec_of(SHAPES, dtype)
    x = (4 * vector(spec.numel, dtype)).round()  # with many ties
    found = through_the_wire(BlockTopK(ratio, block), x, spec)
    for shape, given_, kept in zip(SHAPES, spec.split(x), spec.split(found), strict=True):
        expected = sparsified(given_.double().numpy().reshape(shape), ratio, block)
        assert np.array_equal(kept.double().numpy().reshape(shape), expected)


def test_each_block_contracts_as_top_k_does():
    spec, x = spec_of(((640, 640),)), vector(640 * 640)
    error = (through_the_wire(BlockTopK(0.03), x, spec) - x).view(10, 64, 10, 64).square().sum(dim=(1, 3))
    energy = x.view(10, 64, 10, 64).square().sum(dim=(1, 3))
    assert (error <= (1 - 122 / 4096) * energy).all()
    assert error.sum() < 1.01 * (TopK(0.03).decompress(TopK(0.03).compress(x, spec, None), spec) - x).square().sum()


def test_one_block_is_top_k():
    spec, x = Spec.flat(4096), vector(4096)
    assert torch.equal(through_the_wire(BlockTopK(0.01), x, spec), through_exact(x, spec))


def through_exact(x, spec):
    return TopK(0.01).decompress(TopK(0.01).compress(x, spec, None), spec)


def test_bytes_of_a_chunk():
    """12 bits a place, and 2 a value with four means."""
    spec = spec_of(((64, 64),))
    assert BlockTopK(128 / 4096).layout(spec).nbytes == 128 * 4 + 128 * 12 // 8
    assert BlockTopK(128 / 4096, values="statistical").layout(spec).nbytes == 16 + 128 * 2 // 8 + 128 * 12 // 8


def quantized(v):
    """SparseLoCo's quantization of the values of a tensor, transcribed: the bins, and the decoded values."""
    s = v.mean()
    w = 6 * v.std() / 4
    bins = np.clip(np.round((v - s) / w) + 2, 0, 3) if w else np.full(len(v), 2)
    means = np.array([v[bins == b].mean() if (bins == b).any() else 0 for b in range(4)])
    return bins, means[bins.astype(int)]


@pytest.mark.parametrize(
    "make",
    [
        lambda v: v,
        lambda v: v + 3,
        lambda v: v.exp(),
        lambda v: v.sign(),
        lambda v: v * 1e-30,
        lambda v: v * 1e30,
        torch.ones_like,
        torch.zeros_like,
        lambda v: torch.where(v.abs() > 1, v, 5 * v.sign()),
    ],
)
def test_statistical_values_are_the_means_of_their_bins(make):
    counts = (1000, 0, 1, 2, 500)
    v = make(vector(sum(counts)))
    payload = write_values(v, "statistical", counts)
    found = read_values(payload, torch.float64, counts)
    assert len(payload["values"]) == -(-sum(counts) // 8) * 2 and len(payload["means"]) == 4 * len(counts)
    for part, decoded in zip(v.double().split(counts), found.split(counts), strict=True):
        if len(part):
            scale = float(part.abs().max())
            np.testing.assert_allclose(decoded, quantized(part.numpy())[1], rtol=0, atol=2e-7 * scale)
            assert (decoded - part).square().sum() <= part.square().sum() * (1 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False, width=32), min_size=1, max_size=40))
def test_statistical_values_contract(values):
    """The error is below the norm of whatever is not zero, even for a pair of opposite values."""
    v = torch.tensor(values, dtype=torch.float64)
    found = read_values(write_values(v, "statistical", (len(v),)), torch.float64, (len(v),))
    bound = (1 - 0.25 / len(v)) * v.square().sum()
    assert (found - v).square().sum() <= bound * (1 + 1e-6)


def test_statistical_values_do_not_depend_on_the_order_of_sums():
    v = vector(5000)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    a, b = (write_values(each, "statistical", (5000,)) for each in (v, v[order]))
    assert torch.equal(a["means"], b["means"])
    decoded = read_values(a, torch.float32, (5000,))[order]
    assert torch.equal(decoded, read_values(b, torch.float32, (5000,)))


def test_error_feedback_sends_in_the_end_what_two_bits_left_out():
    spec = spec_of(((70, 130), (50,)))
    compressor = ErrorFeedback(BlockTopK(0.1, values="statistical"))
    state, x = compressor.init(spec, torch.device("cpu")), vector(9150)
    total = torch.zeros(9150)
    for _ in range(200):
        compressor.accumulate(compressor.compress(x, spec, state), spec, total, 1 / 200)
    assert (total - x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_refused_and_the_tensor_named(bad):
    spec = spec_of(((70, 130), (50,)))
    x = vector(9150)
    x[-3] = bad
    with pytest.raises(DivergenceError, match="NaN"):
        BlockTopK(0.1, values="statistical").compress(x, spec, None)
    if math.isnan(bad):
        for compressor in (BlockTopK(0.1), PerTensor(BlockTopK(0.1))):
            with pytest.raises(DivergenceError, match="p1: NaN"):
                compressor.compress(x, spec, compressor.init(spec, x.device))


def test_a_damaged_place_is_refused():
    spec, compressor = spec_of(((10,),)), BlockTopK(0.1)
    payload = compressor.compress(vector(10), spec, None)
    payload["indices"].fill_(255)
    with pytest.raises(IndexError, match="damaged"):
        compressor.decompress(payload, spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockTopK(0.1, block=4097), r"compression.block = 4097 must be in 1\.\.\.4096"),
        (lambda: BlockTopK(0.1, block=0), "compression.block = 0"),
        (lambda: BlockTopK(0), "compression.ratio = 0"),
        (lambda: BlockTopK(0.1, values="int2"), "compression.values = 'int2' must be .*'statistical'"),
        (lambda: TopK(0.1, values="statistical"), "compression.values = 'statistical' must be one of"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
