"""One layout for the messages of all ranks, which every rank reads without knowing the sender."""

import pytest
import torch
from support import small

from mpicomp.algorithms import Choco
from mpicomp.compression import (
    QSGD,
    BlockTopK,
    ByRank,
    ErrorFeedback,
    HardThreshold,
    PerTensor,
    RandomBlock,
    RandomK,
    Spec,
    TopK,
)
from mpicomp.errors import ConfigError
from mpicomp.exchange import loopback

CPU = torch.device("cpu")
RATIOS = (0.5, 0.001, 0.03, 0.008, 1.0)
KINDS = {
    "topk": TopK,
    "topk_int8": lambda ratio: TopK(ratio, values="int8"),
    "randk": RandomK,
    "randk_unbiased": lambda ratio: RandomK(ratio, shared=False, unbiased=True),
    "block": RandomBlock,
    "threshold": lambda ratio: HardThreshold(3 * ratio),
    "threshold_int8": lambda ratio: HardThreshold(3 * ratio, values="int8"),
    "per_tensor": lambda ratio: PerTensor(TopK(ratio, values="bfloat16"), dense_1d=True),
}


def vector(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def by_rank(kind):
    return ByRank(tuple(map(KINDS[kind], RATIOS)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 9, 300, 5000, 80_000])
def test_every_rank_reads_what_any_other_has_sent(kind, n):
    """Bit for bit what the sender's own compressor reads, through the bytes of the common layout."""
    whole, spec, x = by_rank(kind), Spec(("a", "b"), ((n // 3,), (1, n - n // 3))), vector(n)
    layout = whole.layout(spec)
    for rank, own in enumerate(whole.compressors):
        payload = whole.compress(x, spec, whole.init(spec, CPU, rank))
        wire = torch.full((layout.nbytes,), 0xAB, dtype=torch.uint8)
        used = layout.pack(payload, wire)
        alone = own.compress(x, spec, own.init(spec, CPU, rank))
        assert torch.equal(whole.decompress(layout.unpack(wire[:used]), spec), own.decompress(alone, spec))
        extra = used - own.layout(spec).nbytes_of(alone)
        assert extra <= 14 * len(layout.fields)  # two counts and gaps a field at most, whatever the ratio


def test_few_indices_travel_as_numbers_beside_many_that_are_coded():
    spec, whole = Spec.flat(2000), ByRank((TopK(0.001), TopK(0.2)))
    fields = {field.name: field for field in whole.layout(spec).fields}
    assert list(fields) == ["values", "indices.int16", "indices.uint8"]
    assert all(field.variable for field in fields.values())
    assert (fields["values"].numel, fields["indices.int16"].numel) == (400, 2)
    few, many = (whole.compress(vector(2000), spec, whole.init(spec, CPU, rank)) for rank in (0, 1))
    assert (len(few["indices.int16"]), len(few["indices.uint8"])) == (2, 0)
    assert len(many["indices.int16"]) == 0 < len(many["indices.uint8"])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_compressors_have_the_layout_of_one(kind):
    one, spec = KINDS[kind](0.1), Spec(("a", "b"), ((30,), (20, 20)))
    whole = ByRank((one, one, one))
    assert whole.layout(spec) == one.layout(spec)
    assert (whole.is_contractive, whole.is_unbiased) == (one.is_contractive, one.is_unbiased)


def test_blocks_of_different_length_cannot_be_added_up():
    assert RandomBlock(0.5).has_common_support
    assert not by_rank("block").has_common_support


@pytest.mark.parametrize(
    ("compressors", "message"),
    [
        ((), "a compressor for each rank: none is given"),
        ((TopK(0.1), ErrorFeedback(TopK(0.1))), "rank 1 is a ErrorFeedback. Put ErrorFeedback around ByRank"),
        ((ByRank((TopK(0.1),)),), "rank 0 is a ByRank"),
        ((TopK(0.1), TopK(0.2, values="int8")), "of rank 1 differs from .* of rank 0 in more than ratio or threshold"),
        ((TopK(0.1), RandomK(0.1)), "differs from"),
        ((BlockTopK(0.1), BlockTopK(0.2)), "rank 1 cannot read messages of another ratio"),
        ((PerTensor(TopK(0.1)), TopK(0.1)), "differs from"),
        ((QSGD(bits=2), QSGD(bits=4)), "differs from"),
    ],
)
def test_compressors_that_could_not_be_read_are_refused(compressors, message):
    with pytest.raises(ConfigError, match=message):
        ByRank(compressors)


def test_a_rank_without_a_compressor_is_refused():
    with pytest.raises(ConfigError, match="compressors for ranks 0 to 4, and none for 5"):
        by_rank("topk").init(Spec.flat(9), CPU, 5)


def test_inside_of_per_tensor_it_would_not_know_the_rank():
    with pytest.raises(ConfigError, match="put ByRank around PerTensor, not into it"):
        PerTensor(by_rank("topk")).init(Spec.flat(9), CPU, 0)


@pytest.mark.parametrize("size", [2, 6])
def test_all_ranks_are_told_if_there_are_more_or_fewer_compressors(size):
    with pytest.raises(ConfigError, match=f"ByRank has 5 compressors for {size} ranks"):
        loopback.run(size, small.train, Choco(0.1, by_rank("topk")))
