from functools import partial

import pytest
from support.quadratic import train

from mpicomp.algorithms import (
    ASGD,
    DCASGD,
    DEFATC,
    DGC,
    DPSGD,
    EFSGD,
    GMC,
    LEAD,
    SGD,
    SGP,
    AdaGossip,
    Choco,
    DCGossip,
    DeepSqueeze,
    EfficientAdam,
    LocalSGD,
    MoTEF,
    NoLoCo,
    SparseLoCo,
)
from mpicomp.compression import QSGD, Cast, ErrorFeedback, PerTensor, RandomK, TernGrad, TopK
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.topology import OnePeerExponential, Topology, exponential, random_digraph, ring, star


@pytest.mark.parametrize("method", [Choco(0.1), AdaGossip(0.1), DEFATC(0.1), LEAD()], ids=lambda m: m.name)
class TestFixedSymmetricGraph:
    def test_directed_graph_is_refused(self, method):
        with pytest.raises(TopologyError, match=r"'exponential' has a directed graph .*'dpsgd'"):
            method.check(exponential(5))

    def test_weights_that_are_not_symmetric_are_refused(self, method):
        with pytest.raises(TopologyError, match=r"topology.weights = 'metropolis'"):
            method.check(star(4, weights="uniform"))

    def test_varying_graph_is_refused(self, method):
        with pytest.raises(TopologyError, match=r"'one_peer_exponential' changes from step to step"):
            method.check(OnePeerExponential(4))


def test_averaging_must_preserve_the_mean():
    for method in (DPSGD(), LocalSGD(), DeepSqueeze(0.1)):
        with pytest.raises(TopologyError, match=r"columns of its weights do not sum to one"):
            method.check(star(4, weights="uniform"))
        method.check(exponential(5))


def test_a_digraph_is_for_sgp():
    for method in (DPSGD(), LocalSGD(), DeepSqueeze(0.1)):
        with pytest.raises(TopologyError, match=r"'random_digraph': the rows .* algorithm.kind = 'sgp'"):
            method.check(random_digraph(6))
        with pytest.raises(TopologyError, match=r"'random_digraph': the columns .* 'push' and algorithm.kind = 'sgp'"):
            method.check(random_digraph(6, weights="uniform"))
    for method in (SGP(), SGP(compressor=Cast()), SGP(0.1, TopK(0.1))):
        method.check(random_digraph(6))
        method.check(ring(4))


class TestPush:
    def test_shares_must_sum_to_one(self):
        with pytest.raises(TopologyError, match=r"columns .* do not sum to one, .* Use topology.weights = 'push'"):
            SGP().check(random_digraph(6, weights="uniform"))

    def test_public_copies_need_a_fixed_graph(self):
        SGP(compressor=Cast()).check(OnePeerExponential(4))
        with pytest.raises(TopologyError, match=r"changes from step to step, .* compression.kind = 'TopK'"):
            SGP(0.1, TopK(0.1)).check(OnePeerExponential(4))

    def test_every_rank_must_be_reached(self):
        """Rank 2 sends to nobody, and rank 0 hears nobody."""
        graph = Topology("one_way", [[0.5, 0, 0], [0.5, 0.5, 0], [0, 0.5, 1]])
        with pytest.raises(TopologyError, match=r"'one_way' is not connected: 2 of 3 ranks \(1, 2\) have no path"):
            SGP().check(graph)


def test_sequential_sgd_is_for_one_rank():
    SGD().check(ring(1))
    with pytest.raises(ConfigError, match=r"algorithm.kind = 'sgd' is for one rank, not 3"):
        SGD().check(ring(3))


def test_dpsgd_refuses_lossy_messages():
    with pytest.raises(ConfigError, match=r"would not converge"):
        DPSGD(compressor=TopK(0.1))


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [DPSGD, Choco, AdaGossip, DeepSqueeze, DEFATC, MoTEF, LEAD, SGP])
def test_gamma_must_be_positive(method, gamma):
    with pytest.raises(ConfigError, match=r"algorithm.gamma = .* must be a finite number > 0"):
        method(gamma=gamma)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 1.0}, r"algorithm.beta = 1.0 must be in \[0, 1\)"),
        ({"quasi_global_momentum": -0.1}, "algorithm.quasi_global_momentum"),
        ({"gamma_clip": 0.0}, "algorithm.gamma_clip = 0.0 must be > 0; inf switches it off"),
        ({"epsilon": 0.0}, "algorithm.epsilon"),
    ],
)
def test_adagossip_checks_its_numbers(wrong, message):
    with pytest.raises(ConfigError, match=message):
        AdaGossip(gamma=0.1, **wrong)


@pytest.mark.parametrize("weight", [0.0, 1.1, float("nan")])
def test_motef_checks_its_weight(weight):
    with pytest.raises(ConfigError, match=r"algorithm.gradient_weight = .* must be in \(0, 1\]"):
        MoTEF(gamma=0.1, gradient_weight=weight)


@pytest.mark.parametrize("damping", [0.0, 1.1, float("nan")])
def test_def_atc_checks_its_damping(damping):
    with pytest.raises(ConfigError, match=r"algorithm.damping = .* must be in \(0, 1\]"):
        DEFATC(gamma=0.1, damping=damping)


@pytest.mark.parametrize("method", [Choco, AdaGossip, DeepSqueeze, DEFATC, MoTEF, LEAD, SGP])
def test_methods_with_an_error_memory_take_no_second_one(method):
    with pytest.raises(ConfigError, match=r"compression.error_feedback = true: .* count every error twice"):
        method(0.1, ErrorFeedback(TopK(0.1)))


@pytest.mark.parametrize(
    "compressor",
    [QSGD(bits=4), TernGrad(), RandomK(0.1, unbiased=True), PerTensor(QSGD(bits=4))],
    ids=str,
)
@pytest.mark.parametrize(
    "make",
    [
        *(partial(method, 0.1) for method in (Choco, AdaGossip, DeepSqueeze, DEFATC, MoTEF, SGP, DCGossip)),
        *(lambda compressor, method=method: method(compressor=compressor) for method in (NoLoCo, GMC, DGC)),
        *(EFSGD, EfficientAdam, SparseLoCo),
        *(lambda compressor, method=method: method(downlink=compressor) for method in (EfficientAdam, ASGD, DCASGD)),
    ],
)
def test_methods_that_send_errors_later_refuse_what_amplifies_them(make, compressor):
    with pytest.raises(ConfigError, match=r"(compression|downlink): .* grows without bound. Set .*contractive"):
        make(compressor)


def test_quasi_global_momentum_needs_a_given_gamma():
    AdaGossip("auto")
    with pytest.raises(ConfigError, match=r"algorithm.gamma = 'auto' with .* Give algorithm.gamma a number"):
        AdaGossip("auto", quasi_global_momentum=0.9)


def test_quasi_global_momentum_takes_the_place_of_the_optimizers():
    with pytest.raises(ConfigError, match=r"optimizer.momentum must be 0, not 0.9"):
        train(AdaGossip(0.1, quasi_global_momentum=0.9), ring(2), 1, momentum=0.9)


def test_local_sgd_checks_its_period():
    with pytest.raises(ConfigError, match=r"algorithm.period = 0 must be at least 1"):
        LocalSGD(period=0)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (EFSGD(TopK(0.1)), r"algorithm.inner: EFSGD has no mixing .* Use a gossip method: 'dpsgd', 'choco'"),
        (LocalSGD(), "algorithm.inner: LocalSGD has no mixing"),
        (LEAD(), "algorithm.inner: LEAD has no mixing"),
        (Choco(0.1, overlap=True), r"algorithm.overlap = true: Choco would send behind one gradient, .* Leave it out"),
        (AdaGossip(0.1, overlap=True), "algorithm.overlap = true: AdaGossip"),
        (DPSGD(order="combine_then_adapt"), "Use algorithm.order = 'adapt_then_combine'"),
        (AdaGossip(0.1, quasi_global_momentum=0.9), "algorithm.quasi_global_momentum = 0.9: .* Set it to 0"),
    ],
    ids=str,
)
def test_local_sgd_goes_around_gossip_that_mixes_after_its_step(inner, message):
    with pytest.raises(ConfigError, match=message):
        LocalSGD(4, inner)


def test_local_sgd_needs_the_graph_of_its_inner_algorithm():
    with pytest.raises(TopologyError, match=r"'one_peer_exponential' changes from step to step"):
        LocalSGD(4, Choco(0.1)).check(OnePeerExponential(4))
    LocalSGD(4, DeepSqueeze(0.1)).check(OnePeerExponential(4))
