import pytest
import torch

from mpicomp.compression.indices import any_index_field, index_field, scatter_add_, write_indices
from mpicomp.kernels.reference import index_code_nbytes


@pytest.mark.parametrize("n", [1, 10, 100, 1000, 2**16, 2**16 + 1, 10**6])
def test_the_shorter_of_numbers_and_code_is_sent(n):
    for k in {0, 1, 2, 10, 20, n // 100, n // 10, n // 2, n}:
        if k > n:
            continue
        field = index_field(n, k)
        plain = k * (2 if n <= 2**16 else 4)
        assert field.numel * field.dtype.itemsize + 7 * field.variable <= plain
        indices = torch.randperm(n)[:k].sort().values.int()
        written = write_indices(indices, n, field)
        assert written.keys() == {"indices"} and written["indices"].dtype == field.dtype
        assert len(written["indices"]) <= field.numel if field.variable else len(written["indices"]) == k
        out = torch.zeros(n)
        scatter_add_(out, written, torch.arange(1.0, k + 1), 1.0)
        assert torch.equal(out[indices.long()], torch.arange(1.0, k + 1))
        assert int((out != 0).sum()) == k


def test_few_indices_are_numbers_and_many_are_coded():
    assert index_field(10**6, 3).dtype == torch.int32
    assert index_field(10**4, 3).dtype == torch.int16
    assert index_field(10**6, 10**4).dtype == torch.uint8


@pytest.mark.parametrize("n", [0, 1, 2, 3, 10, 64, 100, 1000, 12345])
def test_the_field_for_any_number_holds_all(n):
    assert any_index_field(n).numel == max((index_code_nbytes(n, k) for k in range(n + 1)), default=0)
