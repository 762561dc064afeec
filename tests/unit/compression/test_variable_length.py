"""Variable-length codes, against a transcription in NumPy, and against compressors with codes of one length."""

import bisect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpicomp.compression import ErrorFeedback, PerTensor, Spec, TopK, UniformGrid, VariableLength
from mpicomp.errors import ConfigError, DivergenceError
from mpicomp.kernels.reference import index_code_nbytes

CPU = torch.device("cpu")


def gaussian(n, dtype=torch.float32, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def power_law(n, alpha):
    generator = torch.Generator().manual_seed(1)
    ranks = torch.arange(1, n + 1, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    return (ranks**-alpha * gaussian(n, torch.float64).sign()).float()


def send(compressor, x):
    """Return the bytes on the wire, and Q(x)."""
    spec = Spec.flat(len(x), x.dtype)
    payload, layout = compressor.compress(x, spec, None), compressor.layout(spec)
    wire = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8)
    used = layout.pack(payload, wire)
    assert used == layout.nbytes_of(payload)
    return used, compressor.decompress(layout.unpack(wire[:used]), spec)


def error(x, y):
    return float((y.double() - x.double()).square().sum() / x.double().square().sum())


def index_nbytes(n, k):
    return index_code_nbytes(n, k) if k < n else 0


def value_nbytes(k, b):
    return math.ceil(k / 8) * b


def most_kept(n, budget, groups):
    """Return the largest number of signs that fit, by bisection."""
    if groups == 1 and value_nbytes(n, 1) <= budget:
        return n
    return bisect.bisect(range(1, n + 1), budget, key=lambda k: index_nbytes(n, k) + value_nbytes(k, 1))


def bounds_of(n, bits, groups):
    budget = max(math.ceil(n * bits / 8), index_nbytes(n, 1) + 1)
    kept = most_kept(n, budget, groups)
    cuts = {math.floor(kept / math.sqrt(2.0 ** (i * (i + 1) // 2)) + 1e-9) for i in range(max(1, groups - 1))}
    return budget, list(itertools.pairwise(sorted({0, *cuts} | ({1} if groups > 1 else set()))))


def rounded(magnitude, low, high, b):
    """Return the harmonic means of the cells that `magnitude` lies in, zeros for no bits."""
    if b == 0:
        return np.zeros_like(magnitude)
    cells = 2 ** (b - 1)
    width = (high - low) / cells
    cell = np.clip((magnitude - low) // width, 0, cells - 1) if width else np.zeros_like(magnitude)
    c, d = low + cell * width, low + (cell + 1) * width
    return np.divide(2 * c * d, c + d, out=np.zeros_like(c), where=c + d > 0)


def transcription(x, bits, groups):
    """Return Q(x) of the lengths that are best of all there are."""
    n = len(x)
    budget, bounds = bounds_of(n, bits, groups)
    parts = min(budget, 512)
    order = np.argsort(-np.abs(x), kind="stable")
    magnitude = np.abs(x)[order]
    ranges = [np.float32([magnitude[stop - 1], magnitude[start]]).astype(float) for start, stop in bounds]
    errors, costs = [], []
    for (start, stop), (low, high) in zip(bounds, ranges, strict=True):
        k = stop - start
        at = magnitude[start + np.arange(256) * k // 256]
        errors.append([k * np.mean((rounded(at, low, high, b) - at) ** 2) for b in range(9)])
        costs.append(
            [math.ceil((index_nbytes(n, k) + value_nbytes(k, b)) * parts / budget) * (b > 0) for b in range(9)]
        )
    fitting = (
        lengths
        for lengths in itertools.product(range(9), repeat=len(bounds))
        if sum(cost[b] for cost, b in zip(costs, lengths, strict=True)) <= parts
    )
    best = min(fitting, key=lambda lengths: sum(e[b] for e, b in zip(errors, lengths, strict=True)))
    out = np.zeros(n)
    for (start, stop), (low, high), b in zip(bounds, ranges, best, strict=True):
        out[order[start:stop]] = rounded(magnitude[start:stop], low, high, b)
    return best, np.sign(x) * out


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("n", "bits", "groups"), [(700, 0.3, 3), (900, 1.0, 4), (3001, 2.0, 4), (50, 1.0, 8), (9, 8, 2), (96, 2, 1)]
)
def test_it_is_the_transcription(n, bits, groups, alpha):
    x = gaussian(n, torch.float64) if alpha == 0 else power_law(n, alpha).double()
    compressor, spec = VariableLength(bits, groups), Spec.flat(n, torch.float64)
    payload = compressor.compress(x, spec, None)
    lengths, expected = transcription(x.numpy(), bits, groups)
    assert payload["lengths"].tolist() == list(lengths)
    np.testing.assert_allclose(compressor.decompress(payload, spec), expected, rtol=1e-12)


@pytest.mark.parametrize("bits", [0.1, 0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0, 0.5, 0.75, 1.0])
def test_the_error_is_smaller_than_that_of_top_k_at_the_same_bytes(alpha, bits):
    n = 100_000
    x = power_law(n, alpha) if alpha else gaussian(n)
    nbytes, y = send(VariableLength(bits), x)
    assert nbytes <= n * bits / 8 + 14 * 8 + 12
    for values, most in (("full", 0.97), ("int8", 1.0)):
        low, high = 1e-5, 1.0
        for _ in range(12):  # the largest ratio that takes no more bytes
            middle = math.sqrt(low * high)
            low, high = (middle, high) if send(TopK(middle, values), x)[0] <= nbytes else (low, middle)
        # what int8 rounds away of the small entries of a heavy tail is more than its top-k leaves out, and the same
        assert error(x, y) < most * error(x, send(TopK(high, values), x)[1])


@pytest.mark.parametrize("bits", [0.05, 0.5, 1.0, 2.0, 4.0])
def test_the_budget_is_kept_and_used(bits):
    n = 100_000
    nbytes, _ = send(VariableLength(bits), gaussian(n))
    assert 0.85 * n * bits / 8 < nbytes <= n * bits / 8 + 14 * 8 + 12


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_group_of_all_entries_is_quantization(bits):
    """At the bytes of a uniform grid of as many levels."""
    x = gaussian(1000, torch.float64)
    nbytes, y = send(VariableLength(bits, groups=1), x)
    magnitude = x.abs().numpy()
    low, high = np.float32([magnitude.min(), magnitude.max()]).astype(float)
    np.testing.assert_allclose(y, np.sign(x.numpy()) * rounded(magnitude, low, high, bits), rtol=1e-12)
    assert nbytes <= send(UniformGrid(bits), x)[0] - 125 + 12  # of a length, a range and a count


def test_a_tiny_budget_is_sparsification():
    """The first entry of a heavy tail, exactly; some of the largest of others, and nothing else."""
    x = power_law(1000, 1.0)
    assert torch.equal(send(VariableLength(1e-9), x)[1], send(TopK(1e-9), x)[1])
    x = gaussian(100_000)
    sent = send(VariableLength(0.01), x)[1] != 0
    assert 40 < sent.sum() < 100 and x[sent].abs().min() >= x.abs().topk(100).values[-1]


def test_larger_entries_have_longer_codes():
    spec = Spec.flat(100_000)
    lengths = VariableLength(0.5).compress(power_law(100_000, 0.75), spec, None)["lengths"].tolist()
    assert lengths[0] == 1  # the largest alone is given by its range
    assert lengths[1:] == sorted(lengths[1:], reverse=True) and len(set(lengths[1:])) > 3


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -1e-3, 1e-45, 1e30, -3e38, 0.7]), min_size=1, max_size=70),
    st.floats(0.01, 8),
    st.integers(1, 16),
)
def test_no_entry_moves_by_more_than_its_magnitude(values, bits, groups):
    x = torch.tensor(values)
    _, y = send(VariableLength(bits, groups), x)
    assert ((y.double() - x.double()).abs() <= x.abs().double() * (1 + 1e-6)).all()
    if groups > 1 and x.abs().max() > 1e-40:
        assert error(x, y) < 1 - 0.9 / len(x)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 100, 5000])
@pytest.mark.parametrize("bits", [0.5, 3.0])
def test_zeros_are_not_sent_and_signs_are_enough_for_equal_magnitudes(n, bits):
    nbytes, y = send(VariableLength(bits), torch.zeros(n))
    assert torch.equal(y, torch.zeros(n)) and nbytes <= 17 * 8 + 12
    equal = 3 * gaussian(n).sign()
    y = send(VariableLength(bits), equal)[1]
    assert ((y == equal) | (y == 0)).all()
    assert (y != 0).float().sum() >= (min(n, 1) if n < 1000 else n * bits / 12)


def test_error_feedback_sends_in_the_end_what_was_left_out():
    spec, x = Spec.flat(5000), gaussian(5000)
    compressor = ErrorFeedback(VariableLength(0.5))
    state, total = compressor.init(spec, CPU), torch.zeros(5000)
    for _ in range(100):
        compressor.accumulate(compressor.compress(x, spec, state), spec, total, 1 / 100)
    assert (total - x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_and_the_tensor_named(bad):
    x, spec = gaussian(90), Spec(("a", "b"), ((60,), (30,)))
    x[70] = bad
    with pytest.raises(DivergenceError, match="NaN"):
        VariableLength().compress(x, spec, None)
    whole = PerTensor(VariableLength())
    with pytest.raises(DivergenceError, match="b: NaN"):
        whole.compress(x, spec, whole.init(spec, CPU))


def test_a_message_from_a_device_becomes_that_of_the_host():
    """Zeros behind codes and values are cut, and damaged indices found, in groups of any message."""
    spec, x = Spec(("a", "b"), ((4000,), (500,))), gaussian(4500)
    for compressor in (VariableLength(), PerTensor(VariableLength(1.0))):
        layout = compressor.layout(spec)
        payload = compressor.compress(x, spec, compressor.init(spec, CPU))
        expected, wire = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
        nbytes = layout.pack(payload, expected)
        longest = {field.name: field.numel for field in layout.fields}
        padded = {name: torch.cat([t, t.new_zeros(longest[name] - len(t))]) for name, t in payload.items()}
        used = layout.pack(padded, wire)
        assert used > nbytes == layout.finish(wire[:used])
        for name, tensor in layout.unpack(wire[:nbytes]).items():
            assert torch.equal(tensor, payload[name])
        layout.check_codes(layout.unpack(wire[:nbytes]))
        code = next(name for name in payload if name.endswith("indices") and payload[name].numel())
        payload[code] = payload[code].clone()
        payload[code][-1] ^= 255
        with pytest.raises(IndexError, match="damaged"):
            layout.check_codes(payload)
        with pytest.raises(IndexError, match="damaged"):
            compressor.decompress(payload, spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariableLength(0), r"compression.bits = 0 must be in \(0, 8\]"),
        (lambda: VariableLength(8.5), "compression.bits = 8.5"),
        (lambda: VariableLength(math.nan), "compression.bits = nan"),
        (lambda: VariableLength(1.0, groups=0), r"compression.groups = 0 must be in 1\.\.\.16"),
        (lambda: VariableLength(1.0, groups=17), "compression.groups = 17"),
    ],
)
def test_parameters_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
