"""Every version of every operation passes the same tests: those of the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_table import (
    AWKWARD,
    CHOICES,
    SCALE,
    chosen,
    one,
    same,
    sorted_top,
    table_of_blocks,
    top_k_of_blocks,
    top_k_of_parts,
    vector,
)

from mpicomp import kernels
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.kernels import reference

cpu = pytest.importorskip("mpicomp.kernels.cpu")
VERSIONS = {"reference": reference, "cpu": cpu, "chosen": kernels}
DTYPES = [torch.float32, torch.float64]
HALF = [torch.float16, torch.bfloat16]
SIZES = [1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000]
LARGE = [2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1, 272_474]

every = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS.keys())
both = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every
@pytest.mark.parametrize("name", AWKWARD)
@both
def test_top_k_of_awkward_vectors(version, dtype, name):
    for n in (5, 1000, 100_003):
        x = AWKWARD[name](vector(n, dtype))
        for k in {0, 1, n // 1000, n // 100, n // 10, n // 2, n - 1, n}:
            values, indices = version.top_k(x, k)
            expected = sorted_top(x, k)
            assert same(indices, expected[1]), (n, k)
            assert same(values, expected[0])


@every
@both
@pytest.mark.parametrize("n", SIZES + LARGE)
def test_top_k_of_every_size(version, dtype, n):
    x = vector(n, dtype, n)
    for k in {1, n // 100, n // 10, n}:
        assert same(version.top_k(x, k)[1], sorted_top(x, k)[1])


@every
def test_top_k_of_nothing(version):
    values, indices = version.top_k(torch.empty(0), 0)
    assert values.shape == indices.shape == (0,) and indices.dtype == torch.int32


@every
@both
def test_top_k_of_parts(version, dtype):
    top_k_of_parts(version, "cpu", dtype, [*SIZES, 100_003])


@every
@both
def test_top_k_of_blocks(version, dtype):
    for n in (63, 64, 65, 4095, 4096, 4097, 100_003):
        top_k_of_blocks(version, "cpu", dtype, [n])


@pytest.mark.parametrize("version", [reference, cpu])
def test_a_place_outside_of_its_block_is_refused(version):
    _, table, total = table_of_blocks([70], 0.1)
    packed = version.pack_codes(torch.full((total,), 70, dtype=torch.int16), 12)
    with pytest.raises(IndexError, match="damaged"):
        version.block_indices(packed, table, 12, total)


@pytest.mark.parametrize("version", [reference, kernels])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_top_k_of_half_types(version, dtype):
    x = vector(1001, dtype)
    values, indices = version.top_k(x, 100)
    assert values.dtype == dtype and same(indices, sorted_top(x, 100)[1])


@pytest.mark.parametrize("version", [reference, kernels])
def test_a_vector_with_gaps_in_memory(version):
    x = vector(2000)[::2]
    assert same(version.top_k(x, 50)[1], sorted_top(x, 50)[1])


def test_compiled_versions_refuse_gaps_in_memory():
    with pytest.raises(ValueError, match="contiguous"):
        cpu.top_k(vector(20)[::2], 3)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.top_k_of_difference(vector(10), vector(20)[::2], 3)


@every
@both
@pytest.mark.parametrize("n", [1, 70, 100_000])
@pytest.mark.parametrize("where", [0, -1, 0.5])
def test_a_nan_is_refused(version, dtype, n, where):
    x = vector(n, dtype)
    x[int(where * n) if where > 0 else where] = -torch.nan
    for k in {0, 1, n // 100, n}:
        with pytest.raises(DivergenceError, match="NaN"):
            version.top_k(x, k)
        with pytest.raises(DivergenceError, match="NaN"):
            version.top_k_of_difference(x, vector(n, dtype, 1), k)
    with pytest.raises(DivergenceError, match="NaN"):
        version.above(x, 1.0)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -3e38, float("inf")]), min_size=1, max_size=300),
    st.floats(0, 1),
)
def test_ties_go_to_the_lowest_index(values, ratio):
    x = torch.tensor(values)
    k = int(ratio * len(x))
    for version in VERSIONS.values():
        assert same(version.top_k(x, k)[1], sorted_top(x, k)[1])


@every
@both
@pytest.mark.parametrize("n", [3, 1000, 100_003])
def test_top_k_of_a_difference(version, dtype, n):
    x, y = vector(n, dtype), vector(n, dtype, 1) * 1e-3
    y[: n // 3] = x[: n // 3]
    for k in {0, 1, n // 100, n // 10, n}:
        values, indices = version.top_k_of_difference(x, y, k)
        expected = sorted_top(x - y, k)
        assert same(values, expected[0]) and same(indices, expected[1])


@every
@both
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 10_000])
def test_entries_above_a_threshold(version, dtype, n):
    x = vector(n, dtype)
    for threshold in (0.7, 1e-300, 1e30):
        x[: n // 2 : 3] = threshold  # the nearest float, which may lie below, is meant
        values, indices = version.above(x, threshold)
        expected = (x.abs() >= threshold).nonzero().flatten().int()
        assert same(indices, expected) and same(values, x[expected])


@every
@both
@pytest.mark.parametrize("index", [torch.int16, torch.int32])
def test_scattered_values_are_added(version, dtype, index):
    for n, k in ((1, 1), (100, 0), (2**16, 5000)):
        out, values = vector(n, dtype), vector(k, dtype, 1)
        indices = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:k].sort().values
        for weight in (1.0, -1.0, 1 / 3):
            expected = out.clone()
            expected[indices] += values * torch.tensor(weight, dtype=dtype)
            version.scatter_add_(out, indices.to(index), values, weight)
            assert same(out, expected)


@pytest.mark.parametrize("index", [100, -1])
def test_an_index_out_of_range_is_refused(index):
    """A damaged message must not write beyond the vector."""
    for version in (cpu, kernels):
        out = torch.zeros(100)
        with pytest.raises(IndexError, match="damaged"):
            version.scatter_add_(out, torch.tensor([1, index], dtype=torch.int32), torch.ones(2))
        assert out.eq(0).all()


def test_scattered_values_must_fit():
    with pytest.raises(ValueError, match="float64"):
        cpu.scatter_add_(torch.zeros(3), torch.tensor([1]).int(), torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 values"):
        cpu.scatter_add_(torch.zeros(3), torch.tensor([1]).int(), torch.ones(2))


CODERS = {"reference": reference, "cpu": cpu}
coders = pytest.mark.parametrize("version", CODERS.values(), ids=CODERS.keys())


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 1000, 2**15 + 1, 100_003])
def test_indices_survive_their_code(n, choice):
    for k in {0, 1, 2, 7, 8, 9, 63, 64, 65, 129, n // 1000, n // 100, n // 10, n // 3, n // 2, n - 1, n}:
        if k <= n:
            indices = CHOICES[choice](n, k)
            code, other = (version.encode_indices(indices, n) for version in CODERS.values())
            assert same(code, other)
            assert len(code) <= reference.index_code_nbytes(n, k)
            for version in CODERS.values():
                assert same(version.decode_indices(code, k, n), indices)


def test_a_code_of_a_long_vector():
    """Gaps of 30 bits."""
    n, indices = 2**31, torch.tensor([0, 5, 2**30, 2**31 - 1]).int()
    for version in CODERS.values():
        code = version.encode_indices(indices, n)
        assert same(code, reference.encode_indices(indices, n))
        assert same(version.decode_indices(code, 4, n), indices)


@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_codes_are_near_the_entropy(ratio):
    n = 1_000_000
    k = int(n * ratio)
    bits = 8 * len(cpu.encode_indices(chosen(n, k), n))
    entropy = -n * (ratio * np.log2(ratio) + (1 - ratio) * np.log2(1 - ratio))
    assert entropy < bits < 1.02 * entropy


def test_a_dense_code_is_a_bitmap():
    indices = chosen(1000, 500)
    bits = torch.zeros(1000, dtype=torch.bool)
    bits[indices] = True
    assert same(cpu.encode_indices(indices, 1000), reference.pack_bits(bits[: int(indices[-1]) + 1]))


@both
@coders
def test_coded_values_are_added(version, dtype):
    for n, k in ((1, 1), (100, 0), (1000, 65), (100_000, 1000)):
        indices, values = chosen(n, k), vector(k, dtype, 1)
        code = reference.encode_indices(indices, n)
        for weight in (1.0, 1 / 3):
            out = vector(n, dtype)
            expected = out.clone()
            reference.scatter_add_(expected, indices, values, weight)
            version.add_coded_(out, code, values, weight)
            assert same(out, expected)


@coders
def test_damaged_codes_are_refused(version):
    """Or decode to other indices within the vector; never does a write go beyond it."""
    n, k = 5000, 300
    code = reference.encode_indices(chosen(n, k), n)
    generator, refused = np.random.default_rng(1), 0
    for _ in range(300):
        wrong = code.clone()
        wrong[generator.integers(len(code), size=3)] = generator.integers(256)
        room = torch.zeros(n + 2000)
        try:
            version.add_coded_(room[1000 : n + 1000], wrong, torch.ones(k))
        except IndexError as error:
            assert "damaged" in str(error)
            refused += 1
        assert not room[:1000].any() and not room[n + 1000 :].any()
    assert refused > 100
    for wrong in (code[:-1], code[:5], torch.cat([code, torch.ones(9, dtype=torch.uint8)])):
        with pytest.raises(IndexError, match="damaged"):
            version.decode_indices(wrong, k, n)


@pytest.mark.parametrize(("n", "k"), [(5000, 300), (5000, 3), (300, 200), (7, 7), (9, 1)])
def test_a_check_of_a_code_finds_what_decoding_would(n, k):
    """It may refuse more: it counts bits that decoding does not look at, behind the low bits of the last indices."""
    code, generator = cpu.encode_indices(chosen(n, k), n), np.random.default_rng(2)
    reference.check_code(code, k, n)
    reference.check_code(torch.cat([code, torch.zeros(5, dtype=torch.uint8)]), k, n)
    last = cpu.encode_indices(torch.arange(n - k, n).int(), n)
    reference.check_code(last, k, n)
    wrong_ones = [code[:-1], torch.cat([code, torch.ones(1, dtype=torch.uint8)])]
    for _ in range(100):
        wrong = last.clone()
        wrong[generator.integers(len(wrong))] ^= 1 << int(generator.integers(8))
        wrong_ones.append(wrong)
    for wrong in wrong_ones:
        try:
            cpu.decode_indices(wrong, k, n)
        except IndexError:
            with pytest.raises(IndexError, match="damaged"):
                reference.check_code(wrong, k, n)


@both
@pytest.mark.parametrize("n", [0, 1, 7, 15, 17, 2**16 + 5])
def test_mixing_is_the_same_bit_for_bit(dtype, n):
    for gamma in (1 / 3, 1.0):
        mixed = []
        for version in VERSIONS.values():
            x, s, x_hat = (vector(n, dtype, seed) for seed in range(3))
            version.mix_(x, s, x_hat, gamma)
            mixed.append(x)
        torch.testing.assert_close(mixed[0], vector(n, dtype) + gamma * (s - x_hat))
        assert all(same(mixed[0], other) for other in mixed)


@both
@pytest.mark.parametrize("n", [0, 1, 7, 15, 17, 2**16 + 5])
@pytest.mark.parametrize("clip", [1.0, float("inf")])
def test_the_adaptive_mix_is_the_same_bit_for_bit(dtype, n, clip):
    mixed = []
    for version in VERSIONS.values():
        x, s, x_hat, v = (vector(n, dtype, seed) for seed in range(4))
        v.square_().mul_(0.1)
        s[: n // 4] = x_hat[: n // 4]  # no error yet
        v[: n // 5] = 0
        before = x.clone(), v.clone()
        version.adaptive_mix_(x, s, x_hat, v, 0.01, 0.9, 0.19, 1e-8, clip)
        mixed.append((x, v))
    r = s - x_hat
    second = 0.9 * before[1] + 0.1 * r * r
    torch.testing.assert_close(mixed[0][1], second)
    step = (0.01 / ((second / 0.19).sqrt() + 1e-8)).clamp(max=clip)
    torch.testing.assert_close(mixed[0][0], before[0] + step * r)
    assert all(same(mixed[0][0], x) and same(mixed[0][1], v) for x, v in mixed)


@both
@pytest.mark.parametrize("n", [0, 1, 1000, 1023, 1024, 1025, 2**18 + 1, 2**20 + 3])
def test_sums_are_the_same_bit_for_bit(dtype, n):
    x = vector(n, dtype)
    for name, exact in (("mean_magnitude", x.double().abs().sum() / max(1, n)), ("norm", x.double().norm())):
        first, *others = (getattr(version, name)(x) for version in VERSIONS.values())
        assert float(first) == pytest.approx(float(exact), rel=1e-12 if name == "norm" else 1e-7)
        assert others == [first, first]


@every
@both
def test_sums_of_tiny_and_huge_entries(version, dtype):
    for scale in (torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max / 64):
        x = vector(100, dtype) * scale
        assert float(version.norm(x)) == pytest.approx(float((x.double() / scale).norm()) * scale, rel=1e-6)


@every
@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_sums_refuse_what_is_not_finite(version, dtype, bad):
    for n in (1, 2000):
        x = vector(n, dtype)
        x[-1] = bad
        for operation in (version.mean_magnitude, version.norm):
            with pytest.raises(DivergenceError, match="infinity"):
                operation(x)


@pytest.mark.parametrize("n", [0, 1, 1000, 2**16 + 1])
def test_noise_is_the_same_bit_for_bit(n):
    for seed in (0, 1, 2**64 - 1, 0x123456789ABCDEF0):
        first, *others = (version.noise(torch.zeros(n), seed) for version in VERSIONS.values())
        assert first.dtype == torch.float32 and first.shape == (n,)
        assert all(same(first, other) for other in others)


def test_noise_is_pinned():
    """A restart draws it again, maybe with another version."""
    assert (reference.noise(torch.zeros(3), 7) * 2**24).tolist() == [1624494, 3595957, 13110550]


@every
def test_noise_is_uniform_and_not_correlated(version):
    n = 100_000
    a, b = version.noise(torch.zeros(n), 5), version.noise(torch.zeros(n), 6)
    assert a.min() >= 0 and a.max() < 1
    counts = torch.histc(a, 50, 0, 1)
    assert float(((counts - n / 50) ** 2 / (n / 50)).sum()) < 95  # chi-square of 49 degrees: 1e-4
    for other in (b, a.roll(1), a.roll(64)):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 5 / n**0.5


@both
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 2**16 + 9])
def test_levels_are_the_same_bit_for_bit(dtype, bits, n):
    x = vector(n, dtype)
    x[: n // 5] = 0
    for unit in (reference.norm(x, 2**bits - 1), *map(one, (1e-3, 0.0, 1e-320, 1e30))):
        first, *others = (version.quantize(x, unit, bits, 99 << 33) for version in VERSIONS.values())
        assert all(same(first, other) for other in others)
        sums = []
        for version in VERSIONS.values():
            out = vector(n, dtype, 1)
            version.add_quantized_(out, first, bits, SCALE, 1 / 3)
            sums.append(out)
        assert all(same(sums[0], other) for other in sums)


@every
@both
def test_levels_are_right_on_average(version, dtype):
    x = torch.tensor([0.0, 0.25, -0.5, 2.9, -3.0, 100.0], dtype=dtype).repeat(20_000)
    out = torch.zeros_like(x)
    version.add_quantized_(out, version.quantize(x, one(1.0), 2, 3), 2, one(1.0))
    assert set(out.tolist()) == {0.0, 1.0, -1.0, 2.0, 3.0, -3.0}
    mean = out.view(-1, 6).mean(dim=0)
    torch.testing.assert_close(mean, torch.tensor([0, 0.25, -0.5, 2.9, -3, 3], dtype=dtype), rtol=0, atol=0.02)


@both
@pytest.mark.parametrize("places", [1, 3, 7, 31])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 2**16 + 9])
def test_places_on_a_grid_are_the_same_bit_for_bit(dtype, places, n):
    x, bits = vector(n, dtype), 1 + places.bit_length()
    middles, grid = [2.0**i for i in range(-places, 0)], [i / 7 for i in range(places + 1)]
    x[: n // 5] = 0
    x[n // 2 : n // 2 + 3] = torch.tensor([0.5, -0.25, -0.0], dtype=dtype)[: len(x[n // 2 : n // 2 + 3])]  # ties
    for unit in map(one, (1.0, 3.7, 0.0, 1e-320, 1e30)):
        first, *others = (version.round_to_grid(x, unit, middles, bits) for version in VERSIONS.values())
        assert all(same(first, other) for other in others)
        sums = []
        for version in VERSIONS.values():
            out = vector(n, dtype, 1)
            version.add_gridded_(out, first, grid, bits, SCALE, 1 / 3)
            sums.append(out)
        assert all(same(sums[0], other) for other in sums)


@every
@both
def test_places_on_a_grid(version, dtype):
    """A middle belongs to the place above it; the sign comes back."""
    x = torch.tensor([0.0, 0.9, 1.0, -1.9, -2.0, 100.0, -0.9], dtype=dtype) * 3
    out = torch.zeros_like(x)
    version.add_gridded_(out, version.round_to_grid(x, one(3.0), [1.0, 2.0], 3), [0.0, 10.0, 20.0], 3, one(0.25), 2.0)
    assert out.tolist() == [0, 0, 5, -5, -10, 10, 0]


@every
@both
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 2**16 + 9])
def test_signs(version, dtype, n):
    x = vector(n, dtype)
    x[: n // 4] = -0.0
    packed = version.pack_signs(x)
    assert same(packed, reference.pack_bits(x >= 0))
    out = vector(n, dtype, 1)
    step = torch.tensor(float(SCALE) * (1 / 3), dtype=dtype)
    expected = out + torch.where(x >= 0, step, -step)
    version.add_signs_(out, packed, SCALE, 1 / 3)
    assert same(out, expected)


def test_packed_bits_must_fit():
    for packed in (torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)):
        with pytest.raises(ValueError, match="8 codes of 1 bits"):
            cpu.add_signs_(torch.zeros(8), packed, SCALE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_are_mixed_by_the_definition(dtype):
    x, s, x_hat, v = (vector(100, dtype, seed).abs() for seed in range(4))
    kernels.mix_(x, s, x_hat, 0.5)
    kernels.adaptive_mix_(x, s, x_hat, v, 0.01, 0.9, 0.19, 1e-4, 1.0)
    assert x.isfinite().all()


def test_the_environment_can_insist_on_the_definitions(monkeypatch):
    monkeypatch.setenv("MPICOMP_KERNELS", "reference")
    kernels.compiled.cache_clear()
    assert kernels.compiled() is None
    monkeypatch.setenv("MPICOMP_KERNELS", "fast")
    kernels.compiled.cache_clear()
    with pytest.raises(ConfigError, match=r"MPICOMP_KERNELS = 'fast' must be"):
        kernels.compiled()
    monkeypatch.undo()
    kernels.compiled.cache_clear()
    assert kernels.compiled() is cpu
