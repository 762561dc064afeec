"""The contract of every compressor, over sizes, types and awkward values."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.methods import COMPRESSORS as CONFIGURED

from mpicomp.compression import (
    COMPRESSORS,
    QSGD,
    BlockTopK,
    ByRank,
    Cast,
    ErrorFeedback,
    HardThreshold,
    LogGrid,
    PerTensor,
    RandomBlock,
    RandomK,
    SampledTopK,
    Spec,
    TernGrad,
    TopK,
    UniformGrid,
    VariableLength,
)
from mpicomp.compression.base import BLOCK
from mpicomp.compression.indices import scatter_add_
from mpicomp.errors import ConfigError, DivergenceError

CPU = torch.device("cpu")
CASES = {
    **CONFIGURED,
    "randk_unbiased": RandomK(0.2, unbiased=True),
    "qsgd_unbiased": QSGD(bits=3),
    "qsgd8": QSGD(bits=8),
    "terngrad_unbiased": TernGrad(),
    "topk_1_percent": TopK(0.01),
    "topk_all": TopK(1.0),
    **{f"topk_{values}": TopK(0.1, values=values) for values in ("float32", "bfloat16", "float16", "int8")},
    "topk_int8_dense_1d": PerTensor(TopK(0.1, values="int8"), dense_1d=True),
    "block_topk_3_percent": BlockTopK(0.03),
    "block_topk_16_int8": BlockTopK(0.2, block=16, values="int8"),
    "block_topk_all": BlockTopK(1.0, block=1000),
    "threshold_int8": HardThreshold(0.05, values="int8"),
    "ternary": LogGrid(k=0),
    "log_grid_30": LogGrid(k=30),
    "uniform_grid_1": UniformGrid(bits=1),
    "uniform_grid_8": UniformGrid(bits=8),
    "variable_length_1_bit": VariableLength(bits=1.0, groups=16),
    "variable_length_1_group": VariableLength(bits=4.0, groups=1),
    **{
        f"by_rank_{name}": ByRank(tuple(make(ratio) for ratio in (0.5, 0.003, 0.1, 0.02, 1.0)))
        for name, make in {
            "topk": TopK,
            "topk_int8": lambda ratio: TopK(ratio, values="int8"),
            "per_tensor": lambda ratio: PerTensor(TopK(ratio)),
            "block_per_tensor": lambda ratio: PerTensor(RandomBlock(ratio), dense_1d=True),
            "randk": RandomK,
            "block": RandomBlock,
            "threshold": HardThreshold,
        }.items()
    },
}
SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1000]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

every = pytest.mark.parametrize("compressor", CASES.values(), ids=CASES.keys())


def spec_of(n, dtype=torch.float32):
    """A model of three tensors with `n` entries together."""
    a = n // 3
    return Spec(("a", "b", "c"), ((a,), (1, a), (n - 2 * a,)), dtype)


def vector(n, dtype=torch.float32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def send(compressor, x, spec, state="new"):
    """Compress, pack, unpack; return the payload and its bytes."""
    state = compressor.init(spec, CPU, 3) if state == "new" else state
    payload = compressor.compress(x, spec, state)
    layout = compressor.layout(spec)
    wire = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8)
    used = layout.pack(payload, wire)
    assert used == layout.nbytes_of(payload) <= layout.nbytes
    return layout.unpack(wire[:used]), wire[:used]


def test_every_registered_kind_is_tested():
    def inner(compressor):
        if isinstance(compressor, ByRank):
            return inner(compressor.compressors[0])
        return inner(compressor.inner) if isinstance(compressor, PerTensor | ErrorFeedback) else type(compressor)

    missing = set(COMPRESSORS.values()) - {inner(compressor) for compressor in CASES.values()}
    assert not missing, "add an example to COMPRESSORS of tests/support/methods.py"


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_message_fits_its_layout_and_is_finite(compressor, dtype):
    for n in SIZES:  # in one test, because pytest takes longer for a test than this for a size
        spec, x = spec_of(n, dtype), vector(n, dtype)
        before = x.clone()
        payload, _ = send(compressor, x, spec)
        assert torch.equal(x, before), n
        assert list(payload) == [field.name for field in compressor.layout(spec).fields], n
        y = compressor.decompress(payload, spec)
        assert y.shape == x.shape and y.dtype == dtype, n
        assert y.isfinite().all(), n


@every
@pytest.mark.parametrize("n", [0, 1, 9, 1000])
def test_zero_is_zero(compressor, n):
    spec = spec_of(n)
    assert compressor.decompress(send(compressor, torch.zeros(n), spec)[0], spec).eq(0).all()


@every
@pytest.mark.parametrize("scale", [1e-44, 1e-40, 1e-20, 1e20, 3e37])
def test_tiny_and_huge_values_stay_finite(compressor, scale):
    spec, x = spec_of(100), vector(100).clamp(-3, 3) * scale
    y = compressor.decompress(send(compressor, x, spec)[0], spec)
    assert y.isfinite().all()
    assert y.abs().max() <= 40 * x.abs().max()  # the unbiased ones scale up


@every
def test_indices_are_narrow_and_never_floats(compressor):
    for field in compressor.layout(spec_of(1000)).fields:
        assert field.dtype != torch.int64 or field.name.endswith("seed")
        if "indices" in field.name or "offset" in field.name:
            assert field.dtype in (torch.int16, torch.int32, torch.uint8)  # numbers, or a code


@every
def test_same_input_and_state_same_bytes(compressor):
    spec, x = spec_of(500), vector(500)
    state = compressor.init(spec, CPU, 1)
    compressor.compress(vector(500, seed=5), spec, state)
    again = copy.deepcopy(state)
    assert torch.equal(send(compressor, x, spec, state)[1], send(compressor, x, spec, again)[1])


@every
def test_accumulate_adds_a_weighted_message(compressor):
    spec, x, start = spec_of(300, torch.float64), vector(300, torch.float64), vector(300, torch.float64, 9)
    payload, _ = send(compressor, x, spec)
    out = start.clone()
    compressor.accumulate(payload, spec, out, -0.25)
    torch.testing.assert_close(out, start - 0.25 * compressor.decompress(payload, spec))


@every
def test_state_is_a_plain_dataclass(compressor):
    from mpicomp.state import flatten

    state = compressor.init(spec_of(10), CPU)
    assert state is None or dataclasses.is_dataclass(state)
    flatten(state)


@every
def test_claims_hold_on_average(compressor):
    """Contraction and unbiasedness, over 400 draws."""
    n = 60
    spec, x = spec_of(n, torch.float64), vector(n, torch.float64)
    state = compressor.init(spec, CPU, 2)
    draws = torch.stack([compressor.decompress(compressor.compress(x, spec, state), spec) for _ in range(400)])
    if compressor.is_contractive:
        assert (draws - x).square().sum(dim=1).mean() <= x.square().sum() * (1 - 1e-9 if draws[0].ne(x).any() else 1)
    if not compressor.amplifies:
        assert (draws - x).square().sum(dim=1).mean() <= x.square().sum()
    if compressor.is_unbiased:
        # of the whole vector: an entry that is rounded in one draw of a thousand has no spread in 400
        error = (draws.var(dim=0).sum() / 400).sqrt()
        assert (draws.mean(dim=0) - x).norm() <= 2 * error + 1e-6


def test_qsgd_mean_of_many_draws():
    spec, x = Spec.flat(10), vector(10)
    qsgd = QSGD(bits=2)
    state = qsgd.init(spec, CPU)
    wide = x.repeat(1000)
    total = torch.zeros(10, dtype=torch.float64)
    square = torch.zeros(10, dtype=torch.float64)
    # entries are rounded independently, so one long vector holds 1000 draws for each of ten entries
    for _ in range(100):
        y = qsgd.decompress(qsgd.compress(wide, Spec.flat(10_000), state), Spec.flat(10_000)).double().view(1000, 10)
        total += y.sum(dim=0)
        square += y.square().sum(dim=0)
    mean = total / 1e5
    error = ((square / 1e5 - mean**2) / 1e5).sqrt()
    assert ((mean - x.double()).abs() <= 5 * error + 1e-6).all()


@pytest.mark.parametrize("inner", [c for c in CASES.values() if not isinstance(c, ErrorFeedback)], ids=str)
def test_error_feedback_telescopes(inner):
    """Everything sent and what is left are everything given: exactly, but for rounding in float64."""
    spec, compressor = spec_of(200, torch.float64), ErrorFeedback(inner)
    state = compressor.init(spec, CPU)
    sent, given_ = torch.zeros(200, dtype=torch.float64), torch.zeros(200, dtype=torch.float64)
    for step in range(30):
        x = vector(200, torch.float64, step)
        given_ += x
        compressor.accumulate(compressor.compress(x, spec, state), spec, sent)
    scale = max(1.0, float(state.residual.abs().max()))
    torch.testing.assert_close(sent + state.residual, given_, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize(
    "compressor",
    [c for c in CASES.values() if not isinstance(c, PerTensor | ErrorFeedback | ByRank | RandomBlock)],
    ids=str,
)
def test_per_tensor_is_one_by_one(compressor):
    """But for blocks, which begin elsewhere in each tensor."""
    spec, x = spec_of(100), vector(100)
    whole, state = PerTensor(compressor), PerTensor(compressor).init(spec, CPU, 4)
    parts = copy.deepcopy(state.parts) if state else [None] * 3
    y = whole.decompress(whole.compress(x, spec, state), spec)
    for part, piece, values, inner in zip(spec.parts, spec.split(y), spec.split(x), parts, strict=True):
        assert torch.equal(piece, compressor.decompress(compressor.compress(values, part, inner), part))


def hashed(*key):
    """The generator that all ranks share, splitmix64, written independently of the package."""
    mask = 2**64 - 1
    state = len(key)
    for word in key:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


@pytest.mark.parametrize("dense_1d", [False, True])
@pytest.mark.parametrize("n", [1, 9, 100, 1000])
def test_a_block_of_each_tensor_begins_anywhere_and_wraps_around(n, dense_1d):
    """The rule of the authors' code for DEF: ratio n entries of every tensor from a random start, modulo n."""
    compressor, spec, x = PerTensor(RandomBlock(0.3, seed=5), dense_1d), spec_of(n), vector(n)
    states = [compressor.init(spec, CPU, rank) for rank in range(2)]
    wrapped = set()
    for step in range(20):
        expected, sent, begin = np.zeros(n, np.float32), [], 0
        for i, part in enumerate(spec.parts):
            size, length = part.numel, min(part.numel, max(1, int(0.3 * part.numel + 1e-9)))
            start = 0
            if dense_1d and len(part.shapes[0]) == 1:
                length = size
            elif length < size:
                start = hashed(hashed(5, step) >> 1, i) % size
                wrapped.add(start + length > size)
            places = begin + (start + np.arange(length)) % size if size else np.arange(0)
            expected[places] = x.numpy()[places]
            sent += x.numpy()[places].tolist()
            begin += size
        for state in states:
            payload = compressor.compress(x, spec, state)
            assert payload["values"].tolist() == sent
            assert np.array_equal(compressor.decompress(payload, spec).numpy(), expected)
    assert wrapped == ({True, False} if n > 9 else wrapped)


@every
def test_sums_of_messages_of_common_support_are_messages_of_the_sum(compressor):
    """What a star and the all-reduce of a ring do with the values alone."""
    if not compressor.has_common_support:
        return
    spec, vectors = spec_of(300, torch.float64), [vector(300, torch.float64, rank) for rank in range(3)]
    states = [compressor.init(spec, CPU, rank) for rank in range(3)]
    for _ in range(3):
        payloads = [compressor.compress(x, spec, state) for x, state in zip(vectors, states, strict=True)]
        total = sum(w * compressor.summable(p) for w, p in zip((0.5, 0.3, 0.2), payloads, strict=True))
        found = [compressor.decompress(compressor.with_sum(p, total), spec) for p in payloads]
        expected = sum(w * compressor.decompress(p, spec) for w, p in zip((0.5, 0.3, 0.2), payloads, strict=True))
        for each in found:
            torch.testing.assert_close(each, expected)


def test_blocks_of_each_tensor_have_a_common_support():
    assert CASES["block_per_tensor"].has_common_support and CASES["block"].has_common_support
    assert not CASES["topk_per_tensor"].has_common_support
    assert not CASES["by_rank_block_per_tensor"].has_common_support  # of other lengths


@pytest.mark.parametrize("compressor", [TopK(0.5), CASES["threshold"]], ids=["topk", "threshold"])
def test_nan_is_refused_and_the_tensor_named(compressor):
    x = vector(30)
    x[25] = float("nan")
    with pytest.raises(DivergenceError, match="NaN"):
        compressor.compress(x, Spec.flat(30), None)
    with pytest.raises(DivergenceError, match="c: NaN"):
        PerTensor(compressor).compress(x, spec_of(30), PerTensor(compressor).init(spec_of(30), CPU))


@pytest.mark.parametrize("kind", ["sign", "qsgd", "log_grid", "uniform_grid", "natural"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_scale_and_the_tensor_is_named(kind, bad):
    x, spec, compressor = vector(30), spec_of(30), PerTensor(CASES[kind])
    x[5] = bad
    with pytest.raises(DivergenceError, match="a: NaN or infinity"):
        compressor.compress(x, spec, compressor.init(spec, CPU))


@pytest.mark.parametrize(
    "compressor",
    [Cast("float16"), Cast(), TopK(0.5, values="float16"), TernGrad(), TernGrad(contractive=True)],
    ids=str,
)
def test_infinity_is_refused(compressor):
    spec, x = Spec.flat(30), vector(30)
    x[5] = torch.inf
    with pytest.raises(DivergenceError):
        compressor.compress(x, spec, compressor.init(spec, CPU))


def test_short_random_choices_favor_no_entry():
    for n, k in ((6, 3), (7, 1), (10, 3)):
        compressor, spec = RandomK(k / n, unbiased=True), Spec.flat(n)
        state, mean = compressor.init(spec, CPU), torch.zeros(n)
        for _ in range(4000):
            compressor.accumulate(compressor.compress(torch.ones(n), spec, state), spec, mean, 1 / 4000)
        assert (mean - 1).abs().max() < 5 * math.sqrt((n / k - 1) / 4000)


def test_tensors_of_one_shape_have_random_choices_of_their_own():
    spec, x = Spec(("a", "b"), ((50,), (50,))), torch.ones(100)
    compressor = PerTensor(RandomK(0.1, shared=True))
    ranks = [compressor.decompress(compressor.compress(x, spec, compressor.init(spec, CPU, r)), spec) for r in (0, 1)]
    assert torch.equal(*ranks) and not torch.equal(ranks[0][:50], ranks[0][50:])


@pytest.mark.parametrize("compressor", [RandomK(1e-9), HardThreshold(1.0), SampledTopK(1e-9)], ids=str)
def test_vectors_too_long_for_indices_are_refused(compressor):
    with pytest.raises(ValueError, match="too long for 32-bit indices: compress per tensor"):
        compressor.layout(Spec.flat(3_000_000_000))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -3e38, float("inf")]), min_size=1, max_size=70),
    st.floats(0.01, 1.0),
)
def test_top_k_breaks_ties_by_lowest_index(values, ratio):
    x = torch.tensor(values)
    payload = TopK(ratio).compress(x, Spec.flat(len(x)), None)
    k = max(1, int(len(x) * ratio + 1e-9))
    expected = np.sort(np.argsort(-np.abs(x.numpy()), kind="stable")[:k])
    sent = torch.zeros(len(x))
    scatter_add_(sent, payload, torch.ones(k), 1.0)
    assert sent.nonzero().flatten().tolist() == expected.tolist()


def test_shared_random_choice_is_the_same_on_all_ranks_and_the_private_one_is_not():
    spec, x = Spec.flat(1000), vector(1000)
    for shared in (True, False):
        compressor = RandomK(0.1, shared=shared)
        a, b = (
            compressor.decompress(compressor.compress(x, spec, compressor.init(spec, CPU, r)), spec) for r in (0, 1)
        )
        assert torch.equal(a, b) == shared
    state = compressor.init(spec, CPU)
    first, second = (compressor.decompress(compressor.compress(x, spec, state), spec) for _ in range(2))
    assert not torch.equal(first, second)


def test_indices_from_32768_on_survive_16_bits():
    spec, x = Spec.flat(2**16), torch.zeros(2**16)
    x[[0, 32767, 32768, 65535]] = 1.0
    payload, wire = send(TopK(4 / 2**16), x, spec)
    assert len(wire) == 4 * (4 + 2)
    assert torch.equal(TopK(4 / 2**16).decompress(payload, spec), x)


@every
def test_vectors_longer_than_a_block(compressor):
    n = 2 * BLOCK + 123
    spec = Spec(("x", "y"), ((n - 5,), (5,)))
    x = vector(n)
    payload, _ = send(compressor, x, spec)
    y = compressor.decompress(payload, spec)
    assert float((x * y).sum()) > 0  # it points the same way, in every block
    inner = compressor.compressors[0] if isinstance(compressor, ByRank) else compressor
    for start, stop in ((0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, n)):
        if not isinstance(getattr(inner, "inner", inner), RandomBlock):
            assert float((x[start:stop] * y[start:stop]).sum()) > 0


@pytest.mark.parametrize("compressor", [c for c in CASES.values() if not isinstance(c, ErrorFeedback)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_public_copy_gets_just_what_was_sent(compressor, dtype):
    """Whatever is rounded off or left out stays in the difference."""
    spec, x, x_hat = spec_of(1000, dtype), vector(1000, dtype), vector(1000, dtype, 1) * 0.9
    expected = x_hat.clone()
    payload = compressor.compress_difference_(x, x_hat, spec, compressor.init(spec, CPU, 1), torch.empty_like(x))
    reference = compressor.compress(x - expected, spec, compressor.init(spec, CPU, 1))
    assert list(payload) == list(reference)
    for name, tensor in reference.items():
        assert torch.equal(payload[name], tensor), name
    compressor.accumulate(payload, spec, expected)
    assert torch.equal(x_hat, expected)


@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16", "int8"])
def test_rounded_values_are_close_and_take_their_bytes(values):
    n, k = 10_000, 1000
    x, spec = vector(n, torch.float64) * 1e3, Spec.flat(n, torch.float64)
    compressor = TopK(k / n, values=values)
    payload, wire = send(compressor, x, spec)
    assert payload["values"].element_size() == {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[values]
    exact, _ = send(TopK(k / n), x, spec)
    assert len(wire) < k * (payload["values"].element_size() + 0.7)
    error = {"float32": 2**-24, "bfloat16": 2**-8, "float16": 2**-11, "int8": 2**-8 * 1.01}[values]
    y = compressor.decompress(payload, spec)
    assert (y - TopK(k / n).decompress(exact, spec)).abs().max() <= error * x.abs().max()
    kept_ones = y != 0
    assert ((y - x)[kept_ones].abs() <= x[kept_ones].abs()).all()


def test_values_beyond_16_bits_saturate():
    x = torch.tensor([1e38, -1e38, 1.0])
    y = TopK(1.0, values="float16").decompress(send(TopK(1.0, values="float16"), x, Spec.flat(3))[0], Spec.flat(3))
    assert y.tolist() == [65504.0, -65504.0, 1.0]


def test_values_of_an_unknown_type_are_refused():
    for build in (lambda: TopK(0.1, values="int4"), lambda: HardThreshold(0.1, values="int4")):
        with pytest.raises(ConfigError, match=r"compression.values = 'int4' must be one of 'full', "):
            build()


@pytest.mark.parametrize("heavy", [False, True])
def test_sampled_top_k_keeps_nearly_the_largest(heavy):
    """At most k entries, nearly k of them, and nearly those of the exact selection."""
    n, k = 200_000, 2000
    x = vector(n, torch.float64)
    x = x**5 if heavy else x
    spec, sampled, exact = Spec.flat(n, torch.float64), SampledTopK(0.01), TopK(0.01)
    state = sampled.init(spec, CPU, 3)
    counts = []
    for _ in range(20):
        payload = sampled.compress(x, spec, state)
        counts.append(len(payload["values"]))
        best = exact.decompress(exact.compress(x, spec, None), spec).norm()
        assert sampled.decompress(payload, spec).norm() > 0.8 * best
    assert max(counts) <= k and min(counts) >= 0.8 * k
    assert len(set(counts)) > 1  # another sample each time


@pytest.mark.parametrize("k", [0, 1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_grid_takes_the_nearest_power_of_two(k, dtype):
    """And halfway the larger magnitude; of 2 k + 3 values."""
    grid = torch.tensor([0.0, *(2.0**-i for i in range(k + 1))], dtype=dtype).sort(descending=True).values
    middles = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middles, vector(200, dtype).clamp(-1, 1)]) * 8  # a power of two, so that middles are exact
    x = torch.cat([x, -x])
    nearest = (x.abs()[:, None] / 8 - grid).abs().argmin(dim=1)  # the first of two, which is the larger
    payload, wire = send(LogGrid(k), x, Spec.flat(len(x), dtype))
    assert torch.equal(LogGrid(k).decompress(payload, Spec.flat(len(x), dtype)), x.sign() * grid[nearest] * 8)
    assert len(wire) == 4 + -(-len(x) // 8) * int(np.ceil(np.log2(2 * k + 3)))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_uniform_grid_takes_the_nearest_multiple(bits):
    levels = 2**bits - 1
    halves = torch.arange(0, 2 * levels + 1, dtype=torch.float64) / 2
    x = torch.cat([halves, -halves, vector(200, torch.float64).clamp(-1, 1) * levels])
    spec = Spec.flat(len(x), torch.float64)
    payload, wire = send(UniformGrid(bits), x, spec)
    assert torch.equal(UniformGrid(bits).decompress(payload, spec), torch.from_numpy(np.rint(x.numpy())))
    assert len(wire) == 4 + -(-len(x) // 8) * (bits + 1)


@pytest.mark.parametrize(
    ("make", "message"), [(lambda: LogGrid(31), "compression.k = 31"), (lambda: UniformGrid(0), "compression.bits = 0")]
)
def test_grids_check_their_numbers(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_message_that_does_not_fit_its_layout_says_why():
    layout = TopK(0.5).layout(Spec.flat(4))
    payload = TopK(0.5).compress(torch.arange(4.0), Spec.flat(4), None)
    payload["values"] = payload["values"].double()
    with pytest.raises(ValueError, match=r"2 entries of torch.float64 for 'values', .* 2 of torch.float32"):
        layout.pack(payload, torch.zeros(layout.nbytes, dtype=torch.uint8))
