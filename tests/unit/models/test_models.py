"""Models: shapes, parameter counts, deterministic initialization, and data that they refuse."""

import threading

import pytest
import torch
from torch import nn

from mpicomp.data.dataset import Dataset, Samples
from mpicomp.errors import ConfigError
from mpicomp.models import MODELS, build
from mpicomp.models.normalization import EvoNormS0

IMAGE, COLOR, TEXT = (1, 28, 28), (3, 32, 32), (12,)
CASES = [
    ("logistic", IMAGE, {}),
    ("logistic", (20,), {}),
    ("mlp", IMAGE, {}),
    ("mlp", (20,), {"hidden": [16, 8]}),
    ("lenet5", IMAGE, {}),
    ("lenet5", COLOR, {}),
    ("resnet20", IMAGE, {"norm": "group"}),
    ("resnet20", COLOR, {}),
    ("resnet20", COLOR, {"norm": "evonorm"}),
    ("vgg11", IMAGE, {"norm": "evonorm"}),
    ("vgg11", COLOR, {"norm": "none"}),
    ("lstm", TEXT, {"width": 16, "layers": 2}),
    ("gpt", TEXT, {"width": 16, "layers": 2, "heads": 2}),
    ("gpt", TEXT, {"width": 16, "layers": 2, "heads": 2, "tied": True, "dtype": "bfloat16"}),
]


def make(kind, shape, seed=0, classes=10, **params):
    task = "language" if kind in ("lstm", "gpt") else "classification"
    return build(kind, shape, classes, seed, task=task, **params)


def batch(kind, shape, size=3):
    generator = torch.Generator().manual_seed(1)
    if kind in ("lstm", "gpt"):
        return tuple(torch.randint(0, 10, (size, *shape), generator=generator) for _ in range(2))
    return torch.randn(size, *shape, generator=generator), torch.randint(0, 10, (size,), generator=generator)


NOTHING = Samples(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def problem(task):
    return Dataset("mine", task, 10, NOTHING, NOTHING)


def loss(logits, targets):
    return problem("classification").loss(logits, targets)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_model_is_covered():
    assert {kind for kind, _, _ in CASES} == set(MODELS)


@pytest.mark.parametrize(("kind", "shape", "params"), CASES)
def test_forward_and_backward_reach_every_parameter(kind, shape, params):
    model = make(kind, shape, **params)
    inputs, targets = batch(kind, shape)
    logits = model(inputs)
    assert logits.shape == (*targets.shape, 10)
    loss(logits, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not any(isinstance(module, nn.Dropout) for module in model.modules())


@pytest.mark.parametrize(("kind", "shape", "params"), CASES)
def test_training_lowers_the_loss(kind, shape, params):
    model = make(kind, shape, **params)
    inputs, targets = batch(kind, shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003 if kind in ("vgg11", "resnet20") else 0.1)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "shape", "params", "expected"),
    [
        ("logistic", IMAGE, {}, 7_850),
        ("mlp", (20,), {"hidden": [16]}, 20 * 16 + 16 + 160 + 10),
        ("lenet5", IMAGE, {}, 61_706),
        ("lenet5", COLOR, {}, 62_006),
        ("resnet20", COLOR, {}, 269_722),
        ("resnet20", COLOR, {"norm": "group"}, 269_722),
        ("resnet20", COLOR, {"norm": "evonorm"}, 269_722 + 688),
        ("vgg11", COLOR, {}, 9_231_114 - 2_752),
        ("gpt", TEXT, {"width": 16, "layers": 2}, 2 * (12 * 16**2 + 2 * 16) + 16 + 2 * 10 * 16),
        ("gpt", TEXT, {"width": 16, "layers": 2, "tied": True}, 2 * (12 * 16**2 + 2 * 16) + 16 + 10 * 16),
    ],
)
def test_parameter_counts(kind, shape, params, expected):
    assert count(make(kind, shape, **params)) == expected


def parameters(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("kind", "shape", "params"), CASES)
def test_initialization_depends_on_the_seed_alone(kind, shape, params):
    first = parameters(make(kind, shape, seed=3, **params))
    torch.rand(5)
    assert torch.equal(first, parameters(make(kind, shape, seed=3, **params)))
    if kind != "logistic":
        assert not torch.equal(first, parameters(make(kind, shape, seed=4, **params)))


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    make("mlp", (20,), seed=9)
    assert torch.equal(before, torch.get_rng_state())


def test_threads_that_build_at_once_get_the_same_model():
    expected = parameters(make("lenet5", IMAGE, seed=5))
    built = []
    threads = [threading.Thread(target=lambda: built.append(make("lenet5", IMAGE, seed=5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 8
    assert all(torch.equal(expected, parameters(model)) for model in built)


def test_evonorm_is_the_formula():
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = EvoNormS0(4, groups=2).double()
    with torch.no_grad():
        norm.gamma.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        norm.beta.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        norm.v.copy_(torch.tensor([1.0, 0.5, 2.0, -1.0]))
    y = norm(x)
    for sample in range(2):
        for channel in range(4):
            group = x[sample, 2 * (channel // 2) : 2 * (channel // 2) + 2]
            std = (((group - group.mean()) ** 2).mean() + 1e-5).sqrt()
            one = x[sample, channel]
            expected = one * torch.sigmoid(norm.v[channel] * one) / std * norm.gamma[channel] + norm.beta[channel]
            torch.testing.assert_close(y[sample, channel], expected)


def test_gpt_and_lstm_do_not_look_ahead():
    for kind in ("gpt", "lstm"):
        model = make(kind, TEXT, width=16, layers=2)
        ids, _ = batch(kind, TEXT)
        changed = ids.clone()
        changed[:, 6:] = (changed[:, 6:] + 1) % 10
        with torch.no_grad():
            torch.testing.assert_close(model(ids)[:, :6], model(changed)[:, :6])
            assert not torch.allclose(model(ids)[:, 6:], model(changed)[:, 6:])


def test_loss_and_accuracy_count_every_prediction():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [2.0, 0.0]]])
    targets = torch.tensor([[0, 1], [1, 0]])
    right, wrong = torch.log(1 + torch.exp(torch.tensor([-2.0, 2.0])))
    torch.testing.assert_close(loss(logits, targets), (3 * right + wrong) / 4)
    assert problem("classification").score(logits, targets) == (3, 4)
    assert problem("classification").score(logits[0], targets[0]) == (2, 2)
    assert problem("language").score(logits, targets) is None  # its measure is the perplexity


def test_regression_has_the_squared_error_and_no_accuracy():
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 4.0, 5.0])
    assert problem("regression").loss(outputs, targets) == 5 / 3  # (b, 1) and (b,): not broadcast to (b, b)
    assert problem("regression").score(outputs, targets) is None
    with pytest.raises(ConfigError, match=r"outputs of shape \(3, 2\) for targets of shape \(3,\) of data.kind"):
        problem("regression").loss(outputs.expand(3, 2), targets)


def test_models_of_numbers_take_regression():
    for kind, shape in (("logistic", (20,)), ("mlp", COLOR), ("lenet5", COLOR)):
        assert build(kind, shape, 2, 0, task="regression")(torch.randn(3, *shape)).shape == (3, 2)
    with pytest.raises(ConfigError, match=r"model\.kind = 'gpt' needs sequences"):
        build("gpt", (20,), 2, 0, task="regression")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("gpt", IMAGE, "classification", {}),
            r"model\.kind = 'gpt' needs sequences .* data\.kind = 'mine' gives images",
        ),
        (
            ("resnet20", (20,), "classification", {}),
            r"model\.kind = 'resnet20' needs images, .* gives vectors of shape",
        ),
        (("mlp", TEXT, "language", {}), r"model\.kind = 'mlp' needs images or vectors, .* gives tokens"),
        (("lenet5", (1, 8, 8), "classification", {}), r"needs images of 28x28 or 32x32, .*\(1, 8, 8\)"),
        (("vgg11", (1, 8, 8), "classification", {}), r"needs images of 28x28 or 32x32"),
        (("resnet", COLOR, "classification", {}), r"model\.kind = 'resnet' is unknown\. Did you mean 'resnet20'\?"),
        (
            ("mlp", COLOR, "classification", {"hiden": [3]}),
            r"model\.hiden is no parameter .* Did you mean 'hidden'\?",
        ),
        (("mlp", COLOR, "classification", {"hidden": []}), r"model\.hidden = \[\]"),
        (("mlp", COLOR, "classification", {"hidden": [4, 0]}), r"model\.hidden = 0: must be at least 1"),
        (("resnet20", COLOR, "classification", {"norm": "layer"}), r"model\.norm = 'layer' is unknown"),
        (("resnet20", COLOR, "classification", {"norm": "group", "groups": 3}), r"model\.groups = 3: must divide"),
        (("gpt", TEXT, "language", {"heads": 3}), r"model\.heads = 3: must divide model\.width = 128"),
        (("gpt", TEXT, "language", {"width": 12, "heads": 4}), r"model\.heads = 4: .* into even parts"),
        (("gpt", TEXT, "language", {"dtype": "float16"}), r"model\.dtype = 'float16' must be one of 'float32', 'bf"),
        (("lstm", TEXT, "language", {"layers": 0}), r"model\.layers = 0: must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, message):
    kind, shape, task, params = arguments
    with pytest.raises(ConfigError, match=message):
        build(kind, shape, 10, 0, task=task, data_kind="mine", **params)
