"""Efficient-Adam, 1-bit Adam and PowerSGD against transcriptions in NumPy, torch's own Adam, and identities."""

import numpy as np
import pytest
import torch
from support import small
from support.quadratic import DIM, Quadratic, centers, curvature, top_k, train
from support.steps import one_step

from mpicomp.algorithms import EfficientAdam, OneBitAdam, PowerSGD
from mpicomp.algorithms.low_rank import orthogonal
from mpicomp.compression import QSGD, ErrorFeedback, LogGrid, PerTensor, SignNorm, TopK, UniformGrid
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.exchange import loopback
from mpicomp.topology import ring, star, torus

LR = 0.05
KEPT = 6
TOP = TopK(ratio=KEPT / DIM)
GRAPHS = [ring(5), ring(2), star(4), star(3), ring(1)]
SIGN = PerTensor(SignNorm())
TWO_WAY = [(TOP, TOP), (LogGrid(2), LogGrid(1)), (SIGN, UniformGrid(3)), (QSGD(4, contractive=True),) * 2]

over_graphs = pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{g.name}{g.size}")


def gradients(x, size):
    """Those of all ranks, (size, DIM), at one x (DIM,)."""
    return curvature() * (x - centers(size))


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def kept(v):
    return top_k(v, KEPT)


def log_grid(v):
    """LogGrid(2) of each row, written independently of the package."""
    grid = np.array([1, 0.5, 0.25, 0])
    scale = np.abs(v).max(axis=1, keepdims=True).astype(np.float32).astype(np.float64)
    nearest = np.abs(np.abs(v)[:, :, None] / scale[:, :, None] - grid).argmin(axis=2)
    return np.sign(v) * scale * grid[nearest]


def sign(v):
    """SignNorm of each row, its scale rounded to float32."""
    return np.abs(v).mean(axis=1, keepdims=True).astype(np.float32) * np.where(v >= 0, 1.0, -1.0)


def same_on_all_ranks(trained):
    assert all(np.array_equal(x, trained.x[0]) for x in trained.x)
    return trained.x[0]


class Server:
    """Two-way compression with an error memory at both ends, on rows of all ranks."""

    def __init__(self, size, quantize):
        self.e, self.server_e, self.quantize = np.zeros((size, DIM)), np.zeros(DIM), quantize

    def agree(self, z, weights=None):
        q = self.quantize(z + self.e)
        self.e = z + self.e - q
        p = np.average(q, axis=0, weights=weights) + self.server_e
        answer = self.quantize(p[None])[0]
        self.server_e = p - answer
        return answer


def tolerance(quantize):
    """A scale may be halfway between two float32, and then the last bit of float64 decides."""
    return 1e-10 if quantize is kept else 1e-6


def check_errors(states, server, is_star):
    close(np.stack([state.messages.uplink.residual for state in states]), server.e, tolerance(server.quantize))
    for rank, state in enumerate(states):
        if rank == 0 or not is_star:
            close(state.messages.server_error, server.server_e, tolerance(server.quantize))
        else:
            assert state.messages.server_error.numel() == 0


@over_graphs
class TestTranscriptions:
    @pytest.mark.parametrize(("compressor", "quantize"), [(TOP, kept), (LogGrid(2), log_grid)], ids=["top", "grid"])
    @pytest.mark.parametrize("rates", ["constant", "decaying"])
    def test_efficient_adam(self, graph, rates, compressor, quantize):
        """The listing: no bias correction."""
        server, x = Server(graph.size, quantize), np.zeros(DIM)
        m, v = np.zeros((graph.size, DIM)), np.zeros((graph.size, DIM))
        for t in range(1, 31):
            lr, theta = (LR, 0.97) if rates == "constant" else (LR / np.sqrt(t), 1 - 0.97 / t)
            g = gradients(x, graph.size)
            m = 0.8 * m + 0.2 * g
            v = theta * v + (1 - theta) * g * g
            x = x * (1 - lr * 0.01) - server.agree(lr * m / (np.sqrt(v) + 1e-3))
        numbers = {"beta1": 0.8, "beta2": 0.97, "epsilon": 1e-3, "bias_correction": False}
        method = EfficientAdam(compressor, downlink=compressor, rates=rates, **numbers)
        trained = train(method, graph, 30, lr=LR, weight_decay=0.01)
        close(same_on_all_ranks(trained), x, tolerance(quantize))
        check_errors(trained.states, server, graph.name == "star")

    @pytest.mark.parametrize("bias_correction", [True, False])
    @pytest.mark.parametrize(("compressor", "quantize"), [(TOP, kept), (SignNorm(), sign)], ids=["top", "sign"])
    def test_onebit_adam(self, graph, bias_correction, compressor, quantize):
        server, x, m, v = Server(graph.size, quantize), np.zeros(DIM), np.zeros(DIM), np.zeros(DIM)
        for t in range(1, 31):
            g = gradients(x, graph.size)
            if t <= 10:
                m = 0.8 * m + 0.2 * g.mean(axis=0)
                v = 0.97 * v + 0.03 * g.mean(axis=0) ** 2
            else:
                m = server.agree(0.8 * m + 0.2 * g)
            c1, c2 = (1 - 0.8**t, 1 - 0.97 ** min(t, 10)) if bias_correction else (1, 1)
            x = x * (1 - 0.02 * 0.1) - 0.02 * (m / c1) / (np.sqrt(v / c2) + 1e-3)
        method = OneBitAdam(
            compressor,
            downlink=compressor,
            beta1=0.8,
            beta2=0.97,
            epsilon=1e-3,
            bias_correction=bias_correction,
            freeze_step=10,
        )
        trained = train(method, graph, 30, lr=0.02, weight_decay=0.1)
        close(same_on_all_ranks(trained), x, tolerance(quantize))
        check_errors(trained.states, server, graph.name == "star")

    @pytest.mark.parametrize("momentum", [0.0, 0.8])
    def test_powersgd(self, graph, momentum):
        """Rank 1 on the 2 x 6 tensor, as projections; the other tensor is sent whole."""
        q = torch.randn(6 + DIM // 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)[:6].numpy()
        error, x, velocity = np.zeros((graph.size, 2, 6)), np.zeros(DIM), np.zeros(DIM)
        for _ in range(30):
            g = gradients(x, graph.size)
            m = g[:, 12:].reshape(-1, 2, 6) + error
            mean = m.mean(axis=0)
            p = mean @ q / np.linalg.norm(mean @ q)
            q = mean.T @ p
            error = m - np.outer(p, p) @ mean
            step = np.concatenate([g[:, :12].mean(axis=0), (np.outer(p, p) @ mean).reshape(-1)])
            velocity = momentum * velocity + step
            x = x - LR * (step + velocity if momentum else step)
        trained = train(PowerSGD(rank=1, momentum=momentum, seed=5), graph, 30, lr=LR)
        close(same_on_all_ranks(trained), x, 1e-11)
        errors = np.stack([state.error for state in trained.states])
        close(errors[:, 12:].reshape(-1, 2, 6), error, 1e-11)
        assert not errors[:, :12].any()


def adams(size, kind=torch.optim.Adam, **numbers):
    """Parameters (DIM,) with an optimizer of torch for each rank."""
    parameters = [torch.nn.Parameter(torch.zeros(DIM, dtype=torch.float64)) for _ in range(size)]
    return parameters, [kind([p], lr=LR, betas=(0.9, 0.99), eps=1e-6, **numbers) for p in parameters]


def torch_step(parameter, optimizer, x, g):
    """Return what torch makes of x (DIM,) with g (DIM,)."""
    parameter.data.copy_(torch.as_tensor(x))
    parameter.grad = torch.as_tensor(g)
    optimizer.step()
    return parameter.detach().numpy().copy()


@over_graphs
class TestIdentities:
    def test_efficient_adam_without_compression_is_the_mean_of_local_adam_updates(self, graph):
        parameters, optimizers = adams(graph.size, torch.optim.AdamW, weight_decay=0.1)
        x = np.zeros(DIM)
        for _ in range(25):
            each = zip(parameters, optimizers, gradients(x, graph.size), strict=True)
            x = np.mean([torch_step(p, optimizer, x, g) for p, optimizer, g in each], axis=0)
        method = EfficientAdam(beta2=0.99, epsilon=1e-6)
        close(same_on_all_ranks(train(method, graph, 25, lr=LR, weight_decay=0.1)), x)

    def test_onebit_adam_before_the_freeze_is_adam_on_the_mean_gradient(self, graph):
        ((parameter,), (optimizer,)), x = adams(1), np.zeros(DIM)
        for _ in range(25):
            x = torch_step(parameter, optimizer, x, gradients(x, graph.size).mean(axis=0))
        method = OneBitAdam(SIGN, downlink=SIGN, beta2=0.99, epsilon=1e-6, freeze_step=25)
        close(same_on_all_ranks(train(method, graph, 25, lr=LR)), x)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_powersgd_of_full_rank_is_sgd_on_the_mean_gradient(self, graph, momentum):
        x, m = np.zeros(DIM), np.zeros(DIM)
        for _ in range(25):
            m = momentum * m + gradients(x, graph.size).mean(axis=0)
            x = x - LR * m
        trained = train(PowerSGD(rank=2, min_compression_rate=0.0), graph, 25, lr=LR, momentum=momentum)
        close(same_on_all_ranks(trained), x)
        assert any(state.error.abs().max() > 0.1 for state in trained.states) == (graph.size > 1)  # not sent whole
        close(np.mean([state.error for state in trained.states], axis=0), np.zeros(DIM), 1e-11)

    @pytest.mark.parametrize(("up", "down"), TWO_WAY, ids=str)
    @pytest.mark.parametrize("weighted", [False, True])
    def test_what_is_said_telescopes(self, graph, up, down, weighted):
        """All answers and what the errors hold are all that was to be said."""
        volumes = tuple(range(1, graph.size + 1))
        weights = np.array(volumes if weighted else [1] * graph.size, dtype=float)
        method = EfficientAdam(up, "volume" if weighted else "equal", volumes if weighted else (), down)

        def serve(world):
            local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64))
            exchange = world.exchange(graph)
            state, said, answered = method.init(local, exchange), np.zeros(DIM), torch.zeros(DIM, dtype=torch.float64)
            for z in np.random.default_rng(world.rank).normal(size=(40, DIM)):
                said += z
                answer = method.agree(torch.as_tensor(z.copy()), local, state.messages, exchange)
                method.downlink.accumulate(answer, local.spec, answered)
            return said, answered.numpy(), state.messages

        said, answered, messages = zip(*loopback.run(graph.size, serve), strict=True)
        left = np.average([m.uplink.residual.numpy() for m in messages], axis=0, weights=weights)
        assert np.abs(left).max() > 1e-3  # something is left out
        close(answered[0] + left + messages[0].server_error.numpy(), np.average(said, axis=0, weights=weights), 1e-11)
        assert all(np.array_equal(a, answered[0]) for a in answered)

    def test_the_error_of_powersgd_telescopes(self, graph):
        """All mean gradients are the steps that were made and the mean error."""

        def serve(world):
            c = torch.as_tensor(centers(world.size)[world.rank])
            local, seen = Quadratic(torch.zeros(DIM, dtype=torch.float64), c, LR), np.zeros(DIM)
            compute = local.gradient
            local.gradient = lambda _: np.add(seen, compute().numpy(), out=seen) is None or local.g
            exchange = world.exchange(graph)
            method = PowerSGD(rank=1)
            state = method.init(local, exchange)
            for _ in range(20):
                one_step(method, local, state, exchange)
            return seen, local.x.numpy(), state.error.numpy()

        seen, x, errors = (np.mean(each, axis=0) for each in zip(*loopback.run(graph.size, serve), strict=True))
        assert np.abs(errors).max() > 1e-3
        close(-x / LR + errors, seen, 1e-11)


METHODS = {
    "efficient_adam_top": EfficientAdam(TOP, downlink=TOP),
    "efficient_adam_grid": EfficientAdam(PerTensor(LogGrid(2)), downlink=UniformGrid(4)),
    "efficient_adam_random": EfficientAdam(QSGD(4, contractive=True), downlink=QSGD(4, contractive=True)),
    "onebit_adam": OneBitAdam(SIGN, downlink=SIGN, freeze_step=4),
    "powersgd": PowerSGD(rank=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_star_is_a_ring(name):
    """Bit for bit where messages are summed by rank, but for the dense sums of 1-bit Adam and PowerSGD."""
    on_star, on_ring = (train(METHODS[name], graph(4), 20, lr=0.01).x[0] for graph in (star, ring))
    if name.startswith("efficient"):
        assert np.array_equal(on_star, on_ring)
    else:
        close(on_star, on_ring, 1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_restart_on_a_star_is_exact(name):
    small.assert_restart_is_exact(METHODS[name], star)


class TestOptimum:
    """Of the mean, which no rank has alone."""

    def test_powersgd_reaches_it(self):
        close(train(PowerSGD(rank=1), ring(4), 400, lr=0.1).x, np.tile(centers(4).mean(axis=0), (4, 1)), 1e-8)

    def test_onebit_adam_comes_near_it(self):
        optimum = centers(4).mean(axis=0)
        assert np.abs(optimum).max() > 0.8
        trained = train(OneBitAdam(SIGN, downlink=SIGN, freeze_step=50), ring(4), 400, lr=0.01)
        assert np.abs(trained.x - optimum).max() < 0.25

    def test_efficient_adam_without_noise_goes_to_the_median_of_the_optima_of_the_ranks(self):
        """Each rank's moments make its step one of a sign, and as many signs are positive as negative there."""
        trained = train(EfficientAdam(beta2=0.9), ring(3), 600, lr=0.01)
        close(trained.x, np.tile(np.median(centers(3), axis=0), (3, 1)), 1e-3)


class TestFreeze:
    def frozen(self, epsilon=1e-8):
        """Half of the entries have no gradient, as those of pixels that are always black."""

        def serve(world):
            center = torch.as_tensor(centers(world.size)[world.rank])
            center[::2] = 0
            local = Quadratic(torch.zeros(DIM, dtype=torch.float64), center, 0.01)
            exchange = world.exchange(ring(3))
            method = OneBitAdam(SIGN, downlink=SIGN, freeze_step=10, epsilon=epsilon)
            state = method.init(local, exchange)
            for step in range(60):
                one_step(method, local, state, exchange)
                if step == 9:
                    variance = state.v.clone()
            return local.x, state, variance

        return loopback.run(3, serve)

    def test_the_variance_stays_as_it_is(self):
        for _, state, variance in self.frozen():
            assert torch.equal(state.v, variance)
            assert (variance[1::2] > 0).all()

    def test_what_has_had_no_gradient_does_not_move(self):
        for x, state, _ in self.frozen():
            for vector in (x, state.m, state.v, state.messages.uplink.residual, state.messages.server_error):
                assert (vector[::2] == 0).all()
                assert (vector[1::2] != 0).all()


class TestPowerSGD:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("found", [0, 1, 3])
    def test_the_basis_is_complete_whatever_the_span(self, found, dtype):
        generator = torch.Generator().manual_seed(0)
        p = torch.randn(7, found, generator=generator, dtype=dtype) @ torch.randn(
            found, 3, generator=generator, dtype=dtype
        )
        basis = orthogonal(p)
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=dtype), atol=1e-5, rtol=0)
        torch.testing.assert_close(basis @ (basis.T @ p), p, atol=1e-5, rtol=1e-5)

    def test_a_matrix_without_gradients_comes_back(self):
        def serve(world):
            local = Quadratic(torch.zeros(DIM, dtype=torch.float64), torch.zeros(DIM, dtype=torch.float64))
            exchange, method = world.exchange(ring(2)), PowerSGD(rank=1)
            state = method.init(local, exchange)
            for _ in range(3):
                one_step(method, local, state, exchange)
            assert not local.x.any() and not state.right.any()
            local.center = torch.as_tensor(centers(2)[world.rank])
            for _ in range(400):
                one_step(method, local, state, exchange)
            return local.x.numpy()

        for x in loopback.run(2, serve):
            close(x, centers(2).mean(axis=0), 1e-6)

    @pytest.mark.parametrize("graph", [ring(4), ring(2), star(4)], ids=lambda g: f"{g.name}{g.size}")
    def test_bytes_are_those_of_two_dense_sums(self, graph):
        """Of P, 2 x 1, and of Q, 6 x 1, with the 12 entries of the other tensor."""
        sent, size = train(PowerSGD(rank=1), graph, 7).bytes_sent, graph.size
        if graph.name == "ring":
            pieces = -(-2 // size) + -(-(6 + 12) // size)
            assert sent == [7 * 8 * 2 * (size - 1) * pieces] * size
        else:
            assert sent == [7 * 8 * 20 * (size - 1)] + [7 * 8 * 20] * (size - 1)

    def test_what_would_not_be_shorter_is_sent_whole(self):
        (state, _) = train(PowerSGD(rank=2), ring(2), 3).states  # 2 (2 + 6) > 12
        assert not state.error.any()
        assert len(state.right) == DIM
        (state, _) = train(PowerSGD(rank=1, min_compression_rate=1.6), ring(2), 3).states  # 12 / 8 = 1.5
        assert not state.error.any()


class TestTraffic:
    def test_one_message_up_and_one_down(self):
        method = EfficientAdam(LogGrid(2), downlink=SignNorm())
        up, down = 4 + 3 * DIM // 8, 4 + DIM // 8
        assert train(method, star(4), 5).bytes_sent == [5 * 3 * down] + [5 * up] * 3
        assert train(method, ring(4), 5).bytes_sent == [5 * 3 * up] * 4

    def test_the_warm_up_is_dense(self):
        method = OneBitAdam(SignNorm(), downlink=SignNorm(), freeze_step=3)
        dense, message = 8 * DIM, 4 + DIM // 8
        assert train(method, star(4), 5).bytes_sent == [3 * (3 * dense + 2 * message)] + [3 * dense + 2 * message] * 3
        assert train(method, ring(4), 5).bytes_sent == [3 * 2 * 3 * dense // 4 + 2 * 3 * message] * 4


def vectors(state):
    """How many flat vectors a state holds."""
    if isinstance(state, torch.Tensor):
        return state.numel() / DIM
    return sum(map(vectors, vars(state).values())) if hasattr(state, "__dataclass_fields__") else 0


@pytest.mark.parametrize(
    "method", [EfficientAdam(TOP, downlink=TOP), OneBitAdam(TOP, downlink=TOP)], ids=lambda m: m.name
)
def test_memory_is_the_moments_and_the_errors(method):
    assert [vectors(state) for state in train(method, ring(3), 1).states] == [4, 4, 4]
    assert [vectors(state) for state in train(method, star(3), 1).states] == [4, 3, 3]


class TestChecks:
    @pytest.mark.parametrize("kind", [EfficientAdam, OneBitAdam])
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"compressor": ErrorFeedback(TOP)}, "compression.error_feedback = true"),
            ({"downlink": ErrorFeedback(TOP)}, "downlink.error_feedback = true"),
            ({"beta1": 1.0}, r"algorithm.beta1 = 1.0 must be in \[0, 1\)"),
            ({"beta2": -0.1}, r"algorithm.beta2 = -0.1 must be in \[0, 1\)"),
            ({"epsilon": 0.0}, "algorithm.epsilon = 0.0"),
        ],
    )
    def test_numbers_of_adam(self, kind, wrong, message):
        with pytest.raises(ConfigError, match=message):
            kind(**wrong)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (
                lambda: EfficientAdam(rates="falling"),
                "algorithm.rates = 'falling' must be one of 'constant', 'decaying'",
            ),
            (lambda: EfficientAdam(rates="decaying"), "algorithm.bias_correction = true"),
            (lambda: OneBitAdam(freeze_step=0), "algorithm.freeze_step = 0 must be at least 1"),
            (lambda: PowerSGD(rank=0), "algorithm.rank = 0"),
            (lambda: PowerSGD(momentum=1.0), "algorithm.momentum = 1.0"),
            (lambda: PowerSGD(min_compression_rate=-1.0), "algorithm.min_compression_rate = -1.0"),
        ],
    )
    def test_other_numbers(self, make, message):
        with pytest.raises(ConfigError, match=message):
            make()

    @pytest.mark.parametrize("method", [EfficientAdam(), OneBitAdam(), PowerSGD(momentum=0.9)], ids=lambda m: m.name)
    def test_an_optimizer_with_momentum_is_refused(self, method):
        with pytest.raises(ConfigError, match=r"optimizer.momentum = 0.9"):
            train(method, ring(2), 1, momentum=0.9)

    @pytest.mark.parametrize("method", [EfficientAdam(), OneBitAdam(), PowerSGD()], ids=lambda m: m.name)
    def test_other_graphs_are_refused(self, method):
        with pytest.raises(TopologyError, match="'ring' or 'star'"):
            method.check(torus(6))
