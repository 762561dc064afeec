"""What compressors say of themselves, and that code goes by it: with a wrapper and a compressor from elsewhere."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.methods import COMPRESSORS
from support.quadratic import DIM, train, train_asynchronously

from mpicomp.algorithms import ASGD, DGC, DPSGD, EFSGD, AdaGossip, Choco, DeepSqueeze, EfficientAdam
from mpicomp.compression import (
    QSGD,
    ByRank,
    Cast,
    Compressor,
    ErrorFeedback,
    Field,
    HardThreshold,
    Identity,
    Layout,
    PerTensor,
    SampledTopK,
    SignNorm,
    Spec,
    TernGrad,
    TopK,
    VariableLength,
    Wrapper,
    allocate,
)
from mpicomp.compression.wrap.by_rank import strength_of
from mpicomp.errors import ConfigError
from mpicomp.topology import ring, star

SPEC = Spec(("weight", "bias"), ((20, 10), (10,)))


@dataclass(frozen=True)
class Counted(Wrapper):
    """A wrapper from elsewhere, which changes nothing but the names of a message's fields."""

    label: str = "my"

    def layout(self, spec):
        return Layout(tuple(replace(f, name=f"{self.label}_{f.name}") for f in self.inner.layout(spec).fields))

    def compress(self, x, spec, state):
        return {f"{self.label}_{name}": t for name, t in self.inner.compress(x, spec, state).items()}

    def accumulate(self, payload, spec, out, weight=1.0):
        self.inner.accumulate(self._plain(payload), spec, out, weight)

    def summable(self, payload):
        return self.inner.summable(self._plain(payload))

    def with_sum(self, payload, total):
        summed = self.inner.with_sum(self._plain(payload), total)
        return {f"{self.label}_{name}": t for name, t in summed.items()}

    def _plain(self, payload):
        return {name.removeprefix(f"{self.label}_"): t for name, t in payload.items()}


@dataclass
class Memory:
    """What `Remembering` keeps."""

    left: torch.Tensor
    inner: object


@dataclass(frozen=True)
class Remembering(Wrapper):
    """Error feedback from elsewhere."""

    remembers_errors = True

    def init(self, spec, device, stream=0):
        return Memory(torch.zeros(spec.numel, dtype=spec.dtype, device=device), self.inner.init(spec, device, stream))

    def compress(self, x, spec, state):
        state.left += x
        payload = self.inner.compress(state.left.clone(), spec, state.inner)
        self.inner.accumulate(payload, spec, state.left, -1.0)
        return payload


@dataclass(frozen=True)
class Half(Compressor):
    """The first half of the entries, from elsewhere."""

    has_common_support = True

    def layout(self, spec):
        return Layout((Field("front", spec.dtype, spec.numel // 2),))

    def compress(self, x, spec, state):
        return {"front": x[: spec.numel // 2].clone()}

    def accumulate(self, payload, spec, out, weight=1.0):
        out[: spec.numel // 2].add_(payload["front"], alpha=weight)

    def summable(self, payload):
        return payload["front"]

    def with_sum(self, payload, total):
        return {"front": total}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_relative_error_holds_for_each_entry(name):
    compressor = COMPRESSORS[name]
    x = torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(5))
    sent = compressor.decompress(compressor.compress(x, SPEC, compressor.init(SPEC, x.device)), SPEC)
    assert bool(((sent - x).abs() <= compressor.relative_error * x.abs()).all()) or compressor.relative_error == np.inf
    assert compressor.is_lossless == (name == "identity")


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_wrapper_answers_as_what_it_wraps(name):
    inner = COMPRESSORS[name]
    for wrapped in (Counted(inner), Counted(Counted(inner), label="your")):
        for capability in (
            "is_unbiased",
            "is_contractive",
            "amplifies",
            "relative_error",
            "is_lossless",
            "remembers_errors",
        ):
            assert getattr(wrapped, capability) == getattr(inner, capability)
        assert wrapped.has_common_support == inner.has_common_support
        assert [wrapped.exempts(part) for part in SPEC.parts] == [inner.exempts(part) for part in SPEC.parts]
        assert strength_of(wrapped) == strength_of(inner)


@pytest.mark.parametrize(
    "memory",
    [ErrorFeedback, Remembering, lambda c: Counted(ErrorFeedback(c)), lambda c: PerTensor(Remembering(c))],
    ids=["own", "elsewhere", "wrapped", "per_tensor"],
)
def test_no_method_takes_a_second_error_memory(memory):
    remembering = memory(TopK(0.1))
    for method in (Choco, AdaGossip, DeepSqueeze):
        with pytest.raises(ConfigError, match=r"compression.error_feedback = true: .* count every error twice"):
            method(0.1, remembering)
    with pytest.raises(ConfigError, match=r"compression.error_feedback = true"):
        EFSGD(remembering)
    for method in (EfficientAdam, ASGD):
        with pytest.raises(ConfigError, match=r"downlink.error_feedback = true"):
            method(downlink=remembering)
    with pytest.raises(ConfigError, match="Put ErrorFeedback around"):
        ByRank((remembering, remembering))
    assert ASGD(compressor=remembering).compressors[0] == remembering  # none is put around it


@pytest.mark.parametrize(
    "compressor",
    [
        TopK(0.1),
        HardThreshold(0.1),
        SampledTopK(0.1),
        VariableLength(groups=1),
        PerTensor(HardThreshold(1.0)),
    ],
    ids=str,
)
def test_workers_of_a_hub_remember_what_messages_leave_out(compressor):
    """Also where Q is not contractive, as with a threshold: without a memory, small entries would never be sent."""
    assert ASGD(compressor=compressor).compressors[0] == ErrorFeedback(compressor)


@pytest.mark.parametrize("compressor", [QSGD(bits=4), TernGrad(), Identity()], ids=str)
def test_workers_of_a_hub_send_unbiased_messages_without_a_memory(compressor):
    assert ASGD(compressor=compressor).compressors[0] == compressor


@pytest.mark.parametrize(
    "exact",
    [PerTensor(Identity()), Counted(Identity()), ByRank((Cast("float16"),) * 3), PerTensor(Counted(Cast("bfloat16")))],
    ids=["per_tensor", "wrapped", "by_rank", "nested"],
)
def test_dpsgd_takes_what_is_nearly_exact(exact):
    plain = Identity() if exact.is_lossless else exact
    trained, reference = train(DPSGD(compressor=exact), ring(3), 12), train(DPSGD(), ring(3), 12)
    np.testing.assert_allclose(trained.x, reference.x, rtol=0, atol=2e-2)
    assert np.array_equal(trained.x, train(DPSGD(compressor=plain), ring(3), 12).x)


@pytest.mark.parametrize("lossy", [PerTensor(TopK(0.5)), Counted(SignNorm()), ErrorFeedback(Identity())], ids=str)
def test_dpsgd_refuses_the_rest(lossy):
    with pytest.raises(ConfigError, match="would not converge"):
        DPSGD(compressor=lossy)


@pytest.mark.parametrize("method", [EFSGD, DGC])
@pytest.mark.parametrize("topology", [ring, star])
@pytest.mark.parametrize("inner", [TopK(0.3), PerTensor(TopK(0.3), dense_1d=True), Half()], ids=str)
def test_a_wrapper_in_a_method_that_adds_up_changes_no_bit(inner, topology, method):
    assert np.array_equal(train(method(Counted(inner)), topology(4), 10).x, train(method(inner), topology(4), 10).x)


@pytest.mark.parametrize("topology", [ring, star])
def test_messages_of_common_support_are_added_up_whatever_their_fields_are_called(topology):
    """On a ring of three in pieces, on a star as values alone: what is sent tells."""
    trained = train(EFSGD(Half()), topology(3), 5)
    assert np.array_equal(trained.x, np.tile(trained.x[0], (3, 1)))
    assert np.abs(trained.x[0][: DIM // 2]).min() > 0
    assert not trained.x[0][DIM // 2 :].any()
    half = 8 * DIM // 2
    assert trained.bytes_sent == ([5 * half * 4 // 3] * 3 if topology is ring else [5 * 2 * half, 5 * half, 5 * half])


def test_exempt_tensors_keep_their_momentum_in_a_wrapper_too():
    dense = PerTensor(TopK(0.3), dense_1d=True)
    plain, wrapped = (train(DGC(c), ring(3), 4).states for c in (dense, Counted(dense)))
    for one, other in zip(plain, wrapped, strict=True):
        assert torch.equal(one.u, other.u)
        assert one.u[: DIM // 2].count_nonzero() == DIM // 2  # the first tensor has one dimension
        assert other.u[DIM // 2 :].count_nonzero() < DIM // 2


def test_ratios_by_rank_reach_through_wrappers():
    volumes = [100, 30, 10]
    assert allocate(Counted(TopK(0.3)), volumes) == ByRank(
        tuple(Counted(each) for each in allocate(TopK(0.3), volumes).compressors)
    )
    assert allocate(Remembering(TopK(0.3)), volumes) == Remembering(allocate(TopK(0.3), volumes))
    warming = DGC(Counted(TopK(0.1)), warmup=(0.5,), warmup_steps=3)
    assert [warming.compressor_at(step) for step in (0, 3)] == [Counted(TopK(0.5)), Counted(TopK(0.1))]


def test_a_lossless_answer_is_the_model_itself():
    plain, wrapped = (
        train_asynchronously(ASGD(downlink=c), star(3), 30, [1.0, 1.0, 1.3]) for c in (Identity(), Counted(Identity()))
    )
    assert np.array_equal(plain.x, wrapped.x)
