"""Methods that bear lost messages, against their equations in NumPy; those that do not are refused in test_faults."""

import numpy as np
import pytest
from support.methods import ASYNCHRONOUS, DETERMINISTIC
from support.quadratic import DIM, LOSS_SEED, centers, curvature, top_k, train

from mpicomp.algorithms import DPSGD, Algorithm, DeepSqueeze, NoLoCo
from mpicomp.algorithms.gossip.base import lost_weight
from mpicomp.compression import TopK
from mpicomp.topology import RandomMatching, ring

SIZE, LOSS, LR = 6, 0.2, 0.05
RING = ring(SIZE)


def received(mixing, step):
    """Return the weights of `step`: those of lost messages are on the diagonal."""
    w = mixing.copy()
    for rank, source in zip(*np.nonzero(mixing), strict=True):
        draw = np.random.default_rng([LOSS_SEED, source, rank, step]).random()
        if rank != source and draw < LOSS:
            w[rank, rank] += w[rank, source]
            w[rank, source] = 0
    return w


def local_step(x):
    return x - LR * curvature() * (x - centers(SIZE))


def dpsgd(steps):
    x = np.zeros((SIZE, DIM))
    for step in range(steps):
        x = received(RING.mixing, step) @ local_step(x)
    return x


def deep_squeeze(steps):
    x = e = np.zeros((SIZE, DIM))
    for step in range(steps):
        y = local_step(x)
        q = top_k(y + e, 6)
        e = y + e - q
        x = y + 0.1 * (received(RING.mixing, step) @ q - q)
    return x


def noloco(steps):
    phi = delta = np.zeros((SIZE, DIM))
    for step in range(1, steps, 2):
        d = local_step(local_step(phi)) - phi
        w = received(RandomMatching(SIZE)(step // 2).mixing, step)
        delta = 0.5 * delta + 0.7 * w @ d + 0.7 * (w @ phi - phi)
        phi = phi + delta
    return phi


@pytest.mark.parametrize(
    ("algorithm", "schedule", "oracle"),
    [
        (DPSGD(), RING, dpsgd),
        (DeepSqueeze(0.1, TopK(0.25)), RING, deep_squeeze),
        (NoLoCo(2), RandomMatching(SIZE), noloco),
    ],
)
def test_the_own_takes_the_place_of_what_is_lost(algorithm, schedule, oracle):
    lossy, again = (train(algorithm, schedule, 60, lr=LR, loss=LOSS) for _ in range(2))
    assert np.array_equal(lossy.x, again.x)
    assert np.allclose(lossy.x, oracle(60), atol=1e-12)
    assert not np.allclose(lossy.x, train(algorithm, schedule, 60, lr=LR).x, atol=1e-3)


def test_dpsgd_with_losses_reaches_a_neighborhood_of_the_optimum():
    # How far from it is proportional to the rate, as without losses.
    best = centers(SIZE).mean(axis=0)
    apart = np.linalg.norm(centers(SIZE) - best)
    runs = [train(DPSGD(), RING, steps, lr=lr, loss=LOSS) for steps, lr in ((100, 0.1), (400, 0.02))]
    far, near = (np.linalg.norm(run.x - best) / apart for run in runs)
    assert near < 0.5 * far < 0.25


def test_weights_sum_to_one_whatever_arrives():
    for arrived in ([], [1], [5], [1, 5]):
        own = RING.weight(0, 0) + lost_weight(RING, 0, arrived)
        assert own + sum(RING.weight(0, source) for source in arrived) == pytest.approx(1, abs=1e-15)
    assert lost_weight(RING, 0, [1, 5]) == 0


def test_sums_and_public_copies_need_every_message():
    bearing = {name for name, each in DETERMINISTIC.items() if each.tolerates_loss}
    assert bearing == {
        *("dpsgd", "dpsgd_overlapped", "dpsgd_float16", "deep_squeeze", "deep_squeeze_auto"),
        *("noloco", "diloco_dpsgd", "local_sgd", "local_sgd_float16", "local_sgd_deep_squeeze"),
    }
    assert not any(isinstance(each, Algorithm) for each in ASYNCHRONOUS.values())
