"""DeMo against a transcription with SciPy's cosine transform, an identity, and bad input."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from support.quadratic import DIM, centers, curvature, top_k, train

from mpicomp.algorithms import DeMo
from mpicomp.algorithms.sums.demo import _Largest, transform_
from mpicomp.compression import Spec
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.topology import ring, star, torus

RATES = [0.1 / (1 + step) ** 0.5 for step in range(30)]


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def chunks(x, sides):
    """The chunks of a vector, one a row, whose tensors have the given rows, columns and sides of chunks."""
    found, begin = [], 0
    for rows, columns, height, width in sides:
        matrix = x[begin : begin + rows * columns].reshape(rows // height, height, columns // width, width)
        found.append(matrix.swapaxes(1, 2).reshape(-1, height, width))
        begin += rows * columns
    return found


def joined(found, sides):
    return np.concatenate(
        [
            part.reshape(rows // height, columns // width, height, width).swapaxes(1, 2).ravel()
            for part, (rows, columns, height, width) in zip(found, sides, strict=True)
        ]
    )


def each_chunk(x, sides, function):
    return joined([np.stack([function(chunk) for chunk in part]) for part in chunks(x, sides)], sides)


def coefficients(x, sides):
    return each_chunk(x, sides, lambda chunk: dctn(chunk, type=2, norm="ortho"))


def chunks_of(x, sides):
    return each_chunk(x, sides, lambda chunk: idctn(chunk, type=2, norm="ortho"))


def largest(x, sides, k):
    return each_chunk(x, sides, lambda chunk: top_k(chunk.reshape(1, -1), k).reshape(chunk.shape))


@pytest.mark.parametrize(
    ("shapes", "sides"),
    [
        (((12,), (2, 6)), [(1, 12, 1, 4), (2, 6, 2, 3)]),
        (((4, 2, 2), (7,), ()), [(4, 4, 4, 4), (1, 7, 1, 1), (1, 1, 1, 1)]),
    ],
)
@pytest.mark.parametrize("graph", [ring(5), star(4), ring(1)], ids=str)
def test_the_listing_of_the_paper(graph, shapes, sides):
    """It keeps the momentum itself, and gathers the messages of all ranks."""
    x, m = np.zeros(DIM), np.zeros((graph.size, DIM))
    for lr in RATES:
        x = (1 - lr * 0.01) * x
        m = 0.9 * m + lr * curvature() * (x / (1 - lr * 0.01) - centers(graph.size))
        q = np.stack([largest(coefficients(row, sides), sides, 2) for row in m])
        m = m - np.stack([chunks_of(row, sides) for row in q])
        mean = chunks_of(q.sum(axis=0) / np.maximum((q != 0).sum(axis=0), 1), sides)
        x = x - lr * np.sign(np.where(np.abs(mean) < 1e-14, 0, mean))
    trained = train(DeMo(chunk=5, k=2, momentum=0.9), graph, len(RATES), lr=RATES, weight_decay=0.01, shapes=shapes)
    close(trained.x, np.tile(x, (graph.size, 1)))
    close(np.stack([chunks_of(state.momentum.numpy(), sides) for state in trained.states]), m)


@pytest.mark.parametrize("graph", [ring(3), star(3)], ids=str)
def test_with_all_coefficients_it_is_sign_descent_on_the_mean_gradient(graph):
    x = np.zeros(DIM)
    for lr in RATES:
        x = x - lr * np.sign(curvature() * (x - centers(3).mean(axis=0)))
    trained = train(DeMo(k=DIM), graph, len(RATES), lr=RATES)
    close(trained.x, np.tile(x, (3, 1)), 1e-15)
    assert not any(state.momentum.any() for state in trained.states)


def test_the_largest_coefficients_of_each_chunk_are_sent():
    """Of chunks of 64 x 48, 1 x 10 and 35 x 1, where the message takes 44 bits for each."""
    spec = Spec(("a", "b", "c"), ((128, 96), (10,), (70, 67)))
    sides = [(128, 96, 64, 48), (1, 10, 1, 10), (70, 67, 35, 1)]
    x = torch.randn(spec.numel, generator=torch.Generator().manual_seed(3))
    y, kept = x.clone(), torch.zeros_like(x)
    transform_(y, spec, 64)
    close(y, coefficients(x.double().numpy(), sides), 1e-5)
    compressor = _Largest(64, 32)
    message, layout = compressor.compress(y, spec, None), compressor.layout(spec)
    compressor.accumulate(message, spec, kept)
    assert (kept.numpy() == largest(y.numpy(), sides, 32)).all()
    count = 4 * 32 + 10 + 2 * 67 * 32
    assert message["values"].numel() == count == int((kept != 0).sum())
    assert count * 5.5 <= layout.nbytes <= count * 5.5 + 100
    transform_(y, spec, 64, inverse=True)
    close(y, x, 1e-5)


def test_where_the_cosine_is_zero_rounding_leaves_no_sign():
    x = torch.tensor([0.0, 1.0, 0.0])
    transform_(x, Spec.flat(3), 3, inverse=True)
    assert x.sign().tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeMo(chunk=0), "algorithm.chunk = 0 must be in 1...64"),
        (lambda: DeMo(chunk=65), "algorithm.chunk = 65 must be in 1...64"),
        (lambda: DeMo(k=0), "algorithm.k = 0 must be at least 1"),
        (lambda: DeMo(momentum=1.0), r"algorithm.momentum = 1.0 must be in \[0, 1\)"),
        (lambda: train(DeMo(), ring(2), 1, momentum=0.9), r"optimizer.momentum = 0.9 \(or its betas\): DeMo has a"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_other_graphs_are_refused():
    with pytest.raises(TopologyError, match="'ring' or 'star'"):
        DeMo().check(torus(6))
