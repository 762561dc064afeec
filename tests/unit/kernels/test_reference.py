import pytest
import torch

from mpicomp.kernels.reference import pack_bits, pack_codes, packed_nbytes, random_indices, unpack_bits, unpack_codes


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("bits", range(1, 10))
def test_codes_survive_packing(n, bits):
    codes = torch.randint(2**bits, (n,), generator=torch.Generator().manual_seed(n))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == packed_nbytes(n, bits)
    assert unpack_codes(packed, bits, n).tolist() == codes.tolist()


def test_bits_lie_lowest_first():
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)).tolist() == [1, 3]
    assert unpack_bits(torch.tensor([2, 1], dtype=torch.uint8), 9).nonzero().flatten().tolist() == [1, 8]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_random_indices_are_a_permutation(n):
    indices = random_indices(torch.tensor([12345]), n, n)
    assert indices.dtype == torch.int32
    assert indices.sort().values.tolist() == list(range(n))


def test_random_indices_are_pinned():
    """Both ends of a message draw them, maybe with other versions: they must never change."""
    assert random_indices(torch.tensor([7]), 1000, 5).tolist() == [321, 669, 780, 45, 127]


def test_random_indices_are_uniform():
    counts = torch.zeros(50)
    for seed in range(4000):
        counts[random_indices(torch.tensor([seed * 7919]), 50, 5).long()] += 1
    # each index is drawn with probability 1/10: mean 400, standard deviation 19
    assert ((counts - 400).abs() < 5 * 19).all()


def test_different_seeds_draw_differently():
    draws = {tuple(random_indices(torch.tensor([seed]), 10_000, 4).tolist()) for seed in range(200)}
    assert len(draws) == 200


@pytest.mark.parametrize("n", [70, 72])
def test_a_part_of_the_codes(n):
    codes = torch.arange(n) % 8
    assert unpack_codes(pack_codes(codes, 3), 3, n, 16, 41).tolist() == codes[16:41].tolist()
    assert unpack_codes(pack_codes(codes, 3), 3, n, 64).tolist() == codes[64:].tolist()
