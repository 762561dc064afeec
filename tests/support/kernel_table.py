"""What every version of the kernels must do: one function per line of the contract, and the vectors to try it on.

`tests/unit/kernels/test_triton.py` runs the table in Triton's interpreter, `tests/gpu/test_kernels.py` on a GPU. Each
function takes the version, the device of its tensors, a type and lengths; what it expects comes from the definitions on
the CPU, and is the same bit for bit. `tests/unit/kernels/test_versions.py` has more on the same vectors, on the CPU.
"""

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
import torch

from mpicomp.errors import DivergenceError
from mpicomp.kernels import reference

SCALE = torch.tensor([0.3])
"""Of a message, which travels as float32."""


def one(number, device="cpu"):
    """Return a number as the tensor that a unit is."""
    return torch.tensor([number], dtype=torch.float64, device=device)


def vector(n, dtype=torch.float32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(a, b):
    """Equal bit for bit: +0 is not -0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.uint8}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def sorted_top(x, k):
    """Top-k by a stable sort."""
    order = np.argsort(-np.abs(x.double().numpy()), kind="stable")[:k]
    indices = torch.from_numpy(np.sort(order)).int()
    return x[indices], indices


def sorted_top_of_parts(x, sizes, counts):
    """Top-k of each part."""
    found = [sorted_top(part, k) for part, k in zip(x.split(sizes), counts, strict=True)]
    starts = np.cumsum([0, *sizes])
    return torch.cat([part[0] for part in found]), torch.cat(
        [part[1] + int(start) for part, start in zip(found, starts, strict=False)]
    )


AWKWARD = {
    "normal": lambda x: x,
    "zeros": torch.zeros_like,
    "one value": torch.ones_like,
    "both signs": torch.sign,
    "mostly zeros": lambda x: torch.where(x > 2.2, x, -torch.zeros_like(x)),
    "few values": lambda x: (4 * x).round(),
    "denormal": lambda x: x * torch.finfo(x.dtype).tiny / 8,
    "huge": lambda x: x.clamp(-3, 3) * (torch.finfo(x.dtype).max / 4),
    "heavy tails": lambda x: x.double().mul(8).exp().to(x.dtype),
    "infinite": lambda x: torch.where(x > 1, torch.inf, x),
    "ascending": lambda x: torch.arange(1.0, len(x) + 1).to(x.dtype),
    "periodic": lambda x: torch.where(torch.arange(len(x)) % 64 == 0, x, 1e-3 * x),
    "all large at the end": lambda x: torch.cat([x[: -len(x) // 8] * 1e-6, x[-len(x) // 8 :]])[: len(x)],
}


def chosen(n, k, seed=0):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort().values.int()


CHOICES = {
    "random": chosen,
    "first": lambda n, k: torch.arange(k).int(),
    "last": lambda n, k: torch.arange(n - k, n).int(),
    "both ends": lambda n, k: torch.cat([torch.arange(k // 2), torch.arange(n - k + k // 2, n)]).int(),
}


def assert_same(found, expected):
    """Compare a tensor from any device, or each of several, with what is expected, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert found.shape == expected.shape and same(found.cpu(), expected)
    else:
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same(*pair)


def on(device, *vectors):
    """Return copies on the device."""
    return [x.clone().to(device) for x in vectors]


def top_k(version, device, dtype, sizes):
    for n in sizes:
        x = vector(n, dtype, n)
        for k in {1, n // 10, n}:
            assert_same(version.top_k(x.to(device), k), sorted_top(x, k))
    values, indices = version.top_k(torch.empty(0, dtype=dtype, device=device), 0)
    assert values.shape == indices.shape == (0,) and values.dtype == dtype and indices.dtype == torch.int32


def top_k_of_awkward_vectors(version, device, dtype, sizes):
    n = max(sizes)
    for make in AWKWARD.values():
        x = make(vector(n, dtype))
        for k in (n // 100, n // 2):
            assert_same(version.top_k(x.to(device), k), sorted_top(x, k))


def ties_go_to_the_lowest_index(version, device, dtype, sizes):
    generator = np.random.default_rng(0)
    few = [0.0, -0.0, 1.0, -1.0, 2.0, 1e-45, -3e38, float("inf")]
    for n in sizes:
        x = torch.tensor(generator.choice(few, n), dtype=dtype)
        k = int(generator.integers(n + 1))
        assert_same(version.top_k(x.to(device), k), sorted_top(x, k))


def top_k_of_a_difference(version, device, dtype, sizes):
    for n in sizes:
        x, y = vector(n, dtype), vector(n, dtype, 1) * 1e-3
        y[: n // 3] = x[: n // 3]
        for k in {0, n // 10}:
            assert_same(version.top_k_of_difference(x.to(device), y.to(device), k), sorted_top(x - y, k))


def top_k_of_parts(version, device, dtype, sizes):
    """Of some nothing is wanted, of others all; empty ones, and ones that end where a tile does."""
    sizes = (0, *sizes, 1, 0, 64, max(sizes))
    counts = [(size, size // 10, 0, size // 3)[p % 4] for p, size in enumerate(sizes)]
    n = sum(sizes)
    x, y = vector(n, dtype), vector(n, dtype, 1)
    expected = sorted_top_of_parts(x - y, sizes, counts)
    assert_same(version.top_k_of_parts(*on(device, x, y), sizes, counts), expected)
    for make in AWKWARD.values():
        x = make(vector(n, dtype))
        expected = sorted_top_of_parts(x, sizes, counts)
        assert_same(version.top_k_of_parts(x.to(device), None, sizes, counts), expected)
    empty = torch.empty(0, dtype=dtype, device=device)
    for none in ((), (0, 0)):
        values, indices = version.top_k_of_parts(empty, None, none, none)
        assert values.shape == indices.shape == (0,) and values.dtype == dtype and indices.dtype == torch.int32
    x[sum(sizes[:4])] = torch.nan  # all of part 4 are wanted
    refuses_nan(lambda: version.top_k_of_parts(x.to(device), None, sizes, counts))


def table_of_blocks(sizes, ratio, block=4096):
    """Return the table of runs of `block` of vectors of `sizes`, then of chunks of a matrix (70, 130)."""
    rows, start = [], 0
    for n in sizes:
        for at in range(0, n, block):
            size = min(block, n - at)
            rows.append((start + at, size, 0, size))
        start += n
    for i, j in itertools.product(range(0, 70, 64), range(0, 130, 64)):
        height, width = min(64, 70 - i), min(64, 130 - j)
        rows.append((start + 130 * i + j, width, 130, height * width))
    table = torch.tensor(rows, dtype=torch.int64)
    counts = (table[:, 3] * ratio).long().clamp_min(1)
    table = torch.column_stack([table, counts, counts.cumsum(0) - counts])
    return start + 70 * 130, table, int(counts.sum())


def sorted_top_of_blocks(x, table):
    """Top-k of each block, by a stable sort of it."""
    values, places, indices = [], [], []
    for start, width, stride, size, k, _ in table.tolist():
        at = start + (torch.arange(size // width)[:, None] * stride + torch.arange(width)).flatten()
        largest, chosen = sorted_top(x[at], k)
        values.append(largest)
        places.append(chosen.to(torch.int16))
        indices.append(at[chosen].int())
    return torch.cat(values), torch.cat(places), torch.cat(indices)


def top_k_of_blocks(version, device, dtype, sizes):
    """Runs, and chunks of a matrix; the ratios in turn, and some of a difference."""
    for turn, make in enumerate(AWKWARD.values()):
        n, table, total = table_of_blocks([1, 7, max(sizes)], (0.03, 0.001, 0.5, 0.03, 1.0)[turn % 5])
        x = make(vector(n, dtype, 3))
        y = x.roll(1) if x.isfinite().all() and turn % 2 else None
        values, places, indices = sorted_top_of_blocks(x if y is None else x - y, table)
        there = [None if y is None else y.to(device), table.to(device), total]
        assert_same(version.top_k_of_blocks(x.to(device), *there), (values, places))
    packed = reference.pack_codes(places, 12)
    assert_same(version.pack_codes(places.to(device), 12), packed)
    assert_same(version.block_indices(packed.to(device), table.to(device), 12, total), indices)
    x[n // 2] = -torch.nan
    refuses_nan(lambda: version.top_k_of_blocks(x.to(device), *there))


def refuses_nan(select):
    """Or selects it, where who sends the values is to raise the error."""
    try:
        values, _ = select()
    except DivergenceError as error:
        assert "NaN" in str(error)
    else:
        assert values.isnan().any()


def nan_is_refused(version, device, dtype, sizes):
    for n in sizes:
        for where in (0, n - 1):
            x = vector(n, dtype)
            x[where] = -torch.nan
            x, y = on(device, x, vector(n, dtype, 1))
            refuses_nan(partial(version.top_k, x, 1))
            refuses_nan(partial(version.top_k_of_difference, x, y, 1))
            with pytest.raises(DivergenceError, match="NaN"):
                version.above(x, 1.0)


def above(version, device, dtype, sizes):
    for n in (0, *sizes):
        for threshold in (0.7, 1e-300, 1e30):
            x = vector(n, dtype)
            x[: n // 2 : 3] = threshold  # the nearest float, which may lie below, is meant
            assert_same(version.above(x.to(device), threshold), reference.above(x, threshold))


def scatter_add(version, device, dtype, sizes):
    for n in (*sizes, 2**16):
        for index, weight in ((torch.int16, 1.0), (torch.int32, 1 / 3)):
            if index == torch.int32 or n <= 2**16:
                out, values, indices = vector(n, dtype), vector(n // 10, dtype, 1), chosen(n, n // 10)
                (found,) = on(device, out)
                version.scatter_add_(found, indices.to(index).to(device), values.to(device), weight)
                reference.scatter_add_(out, indices, values, weight)
                assert_same(found, out)


def add_block(version, device, dtype, sizes):
    for n in sizes:
        for length, offset in ((n, 0), (n // 3, n // 2), (0, 0)):
            out, values, place = vector(n, dtype), vector(length, dtype, 1), torch.tensor([offset]).int()
            found, *message = on(device, out, place, values)
            version.add_block_(found, *message, 1 / 3)
            reference.add_block_(out, place, values, 1 / 3)
            assert_same(found, out)


def misfits_are_refused(version, device, dtype, sizes):
    x = vector(20, dtype).to(device)
    index = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="contiguous"):
        version.top_k(x[::2], 3)
    with pytest.raises(ValueError, match="contiguous"):
        version.top_k_of_difference(x[:10], x[::2], 3)
    with pytest.raises(ValueError, match="type, length"):
        version.mix_(x, x, x[:10], 1.0)
    with pytest.raises(ValueError, match="values of"):
        version.scatter_add_(x, index, torch.ones(1, dtype=torch.float16, device=device))
    with pytest.raises(ValueError, match="2 values"):
        version.scatter_add_(x, index, x[:2])
    for packed in (torch.zeros(2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)):
        with pytest.raises(ValueError, match="8 codes of 1 bits"):
            version.add_signs_(x[:8], packed.to(device), SCALE.to(device))


def nothing_is_written_beyond_the_vector(version, device, dtype, sizes):
    """Whatever a damaged message holds."""
    room = torch.zeros(300, dtype=dtype, device=device)
    indices = torch.tensor([-1, 5, 99, 100, 150, 2**31 - 1], dtype=torch.int32, device=device)
    version.scatter_add_(room[100:200], indices, torch.ones(6, dtype=dtype, device=device))
    assert room.nonzero().flatten().tolist() == [105, 199]
    if room.is_cuda or version is not reference:  # a slice of torch ends where the vector does
        for offset in (98, -2):
            version.add_block_(room[100:200], torch.tensor([offset], dtype=torch.int32, device=device), room[:4] + 1)
        assert room.nonzero().flatten().tolist() == [100, 101, 105, 198, 199]


def mix(version, device, dtype, sizes):
    for n in (0, *sizes):
        x, s, x_hat = (vector(n, dtype, seed) for seed in range(3))
        found, *others = on(device, x, s, x_hat)
        version.mix_(found, *others, 1 / 3)
        reference.mix_(x, s, x_hat, 1 / 3)
        assert_same(found, x)


def adaptive_mix(version, device, dtype, sizes):
    for n, clip in zip((0, *sizes), [1.0, float("inf")] * len(sizes), strict=False):
        x, s, x_hat, v = (vector(n, dtype, seed) for seed in range(4))
        v.square_().mul_(0.1)
        s[: n // 4] = x_hat[: n // 4]  # no error yet
        v[: n // 5] = 0
        found = on(device, x, s, x_hat, v)
        version.adaptive_mix_(*found, 0.01, 0.9, 0.19, 1e-8, clip)
        reference.adaptive_mix_(x, s, x_hat, v, 0.01, 0.9, 0.19, 1e-8, clip)
        assert_same(found, (x, s, x_hat, v))


def sums(version, device, dtype, sizes):
    for n in (0, *sizes):
        x = vector(n, dtype)
        for operation in ("mean_magnitude", "norm"):
            assert_same(getattr(version, operation)(x.to(device)), getattr(reference, operation)(x))
        assert_same(version.norm(x.to(device), 15), reference.norm(x, 15))
    for scale in (torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max / 64):
        x = vector(100, dtype) * scale
        assert_same(version.norm(x.to(device)), reference.norm(x))
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = vector(2000, dtype)
        x[-1] = bad
        for operation in (version.mean_magnitude, version.norm):
            assert not operation(x.to(device)).isfinite()  # who sends it raises the error


def noise(version, device, dtype, sizes):
    for n in (0, *sizes):
        x = torch.zeros(n, dtype=dtype)
        for seed in (1, 2**64 - 1, 0x123456789ABCDEF0):
            assert_same(version.noise(x.to(device), seed), reference.noise(x, seed))


def random_indices(version, device, dtype, sizes):
    for n in (*sizes, 2**31):
        for seed in (1, 2**63 - 1):
            k = min(n, 5000)
            key = torch.tensor([seed])
            assert_same(version.random_indices(key.to(device), n, k), reference.random_indices(key, n, k))


def levels(version, device, dtype, sizes):
    for n, bits in zip((0, *sizes), [1, 4, 8] * len(sizes), strict=False):
        x = vector(n, dtype)
        x[: n // 5] = 0
        for unit in (reference.norm(x, 2**bits - 1), one(0.0), one(1e-320), one(1e30)):
            packed = reference.quantize(x, unit, bits, 99 << 33)
            assert_same(version.quantize(x.to(device), unit.to(device), bits, 99 << 33), packed)
        packed, out = reference.quantize(x, one(0.1), bits, 5), vector(n, dtype, 1)
        (found,) = on(device, out)
        version.add_quantized_(found, packed.to(device), bits, SCALE.to(device), 1 / 3)
        reference.add_quantized_(out, packed, bits, SCALE, 1 / 3)
        assert_same(found, out)


def places_on_a_grid(version, device, dtype, sizes):
    for n, places in zip((0, *sizes), [1, 3, 7, 31] * len(sizes), strict=False):
        x, bits = vector(n, dtype), 1 + places.bit_length()
        middles, grid = [2.0**i for i in range(-places, 0)], [i / 7 for i in range(places + 1)]
        x[: n // 5] = 0
        x[n // 2 : n // 2 + 3] = torch.tensor([0.5, -0.25, -0.0], dtype=dtype)[: len(x[n // 2 : n // 2 + 3])]  # ties
        for unit in map(one, (1.0, 3.7, 0.0)):
            packed = reference.round_to_grid(x, unit, middles, bits)
            assert_same(version.round_to_grid(x.to(device), unit.to(device), middles, bits), packed)
        packed, out = reference.round_to_grid(x, one(1.0), middles, bits), vector(n, dtype, 1)
        (found,) = on(device, out)
        version.add_gridded_(found, packed.to(device), grid, bits, SCALE.to(device), 1 / 3)
        reference.add_gridded_(out, packed, grid, bits, SCALE, 1 / 3)
        assert_same(found, out)


def signs(version, device, dtype, sizes):
    for n in (0, *sizes):
        x = vector(n, dtype)
        x[: n // 4] = -0.0
        packed, out = reference.pack_signs(x), vector(n, dtype, 1)
        assert_same(version.pack_signs(x.to(device)), packed)
        (found,) = on(device, out)
        version.add_signs_(found, packed.to(device), SCALE.to(device), 1 / 3)
        reference.add_signs_(out, packed, SCALE, 1 / 3)
        assert_same(found, out)


def index_codes(version, device, dtype, sizes):
    for n in sizes:
        for name, k in zip(CHOICES, (n, n // 2, n // 10, n // 3), strict=True):
            indices = CHOICES[name](n, k)
            code, values, out = reference.encode_indices(indices, n), vector(k, dtype, 1), vector(n, dtype)
            assert_same(reference.trim_code(version.encode_indices(indices.to(device), n)), code)
            assert_same(version.decode_indices(code.to(device), k, n), indices)
            (found,) = on(device, out)
            version.add_coded_(found, code.to(device), values.to(device), 1 / 3)
            reference.add_coded_(out, code, values, 1 / 3)
            assert_same(found, out)
    n, indices = 2**31, torch.tensor([0, 5, 2**30, 2**31 - 1]).int()  # gaps of 30 bits
    code = reference.encode_indices(indices, n)
    assert_same(reference.trim_code(version.encode_indices(indices.to(device), n)), code)
    assert_same(version.decode_indices(code.to(device), 4, n), indices)


def damaged_codes_write_nothing_beyond_the_vector(version, device, dtype, sizes):
    """And are not too short; who receives them has checked the rest."""
    n, k = 500, 30
    code, generator = reference.encode_indices(chosen(n, k), n), np.random.default_rng(1)
    for _ in range(15):
        wrong = code.clone()
        wrong[generator.integers(len(code), size=3)] = generator.integers(256)
        room, ones = torch.zeros(n + 200, dtype=dtype, device=device), torch.ones(k, dtype=dtype, device=device)
        with contextlib.suppress(IndexError):
            version.add_coded_(room[100 : n + 100], wrong.to(device), ones)
        assert not room[:100].any() and not room[n + 100 :].any()
    for wrong in (code[:5], code[:0]):
        with pytest.raises(IndexError, match="damaged"):
            version.decode_indices(wrong.to(device), k, n)


TABLE = [
    top_k,
    top_k_of_awkward_vectors,
    ties_go_to_the_lowest_index,
    top_k_of_a_difference,
    top_k_of_parts,
    top_k_of_blocks,
    nan_is_refused,
    above,
    scatter_add,
    add_block,
    misfits_are_refused,
    nothing_is_written_beyond_the_vector,
    mix,
    adaptive_mix,
    sums,
    noise,
    random_indices,
    levels,
    places_on_a_grid,
    signs,
    index_codes,
    damaged_codes_write_nothing_beyond_the_vector,
]
