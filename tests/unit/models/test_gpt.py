"""The GPT: its equations, rotary positions, bfloat16, and tied weights on their way through training and export."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpicomp.algorithms import DPSGD
from mpicomp.checkpoint import export
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.exchange import loopback
from mpicomp.models.gpt import GPT, rotary_angles, rotate
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring

CLASSES, WIDTH, HEADS = 11, 16, 2


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=0):
    return torch.randint(CLASSES, shape, generator=torch.Generator().manual_seed(seed))


def model(seed=0, layers=2, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = GPT(CLASSES, WIDTH, layers, HEADS, **settings)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.5)  # so that attention is far from uniform
    return made


def normalized(x, weight):
    return x / (x**2).mean(-1, keepdim=True).sqrt() * weight


def by_hand(gpt, ids):
    """The logits (t, classes) of one sequence (t,): a loop over queries, with positions as complex numbers."""
    x = gpt.embedding.weight[ids]
    t, d = len(ids), WIDTH // HEADS
    turns = torch.polar(
        torch.ones(t, d // 2), torch.outer(torch.arange(t), 10_000.0 ** (-2 * torch.arange(d // 2) / d))
    )
    for layer in gpt.layers:
        parts = normalized(x, layer.attention_norm.weight) @ layer.attention.inward.weight.T
        query, key, value = parts.view(t, 3, HEADS, d).unbind(1)
        query, key = (torch.complex(y[..., : d // 2], y[..., d // 2 :]) * turns[:, None] for y in (query, key))
        mixed = torch.zeros(t, HEADS, d)
        for i in range(t):
            scores = (query[i] * key[: i + 1].conj()).real.sum(-1) / math.sqrt(d)
            mixed[i] = (scores.softmax(0)[..., None] * value[: i + 1]).sum(0)
        x = x + mixed.reshape(t, WIDTH) @ layer.attention.outward.weight.T
        hidden = F.gelu(normalized(x, layer.mlp_norm.weight) @ layer.inward.weight.T)
        x = x + hidden @ layer.outward.weight.T
    return normalized(x, gpt.norm.weight) @ gpt.head.weight.T


@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_its_equations(tied):
    gpt, ids = model(tied=tied), tokens(2, 9)
    with torch.no_grad():
        for row, logits in zip(ids, gpt(ids), strict=True):
            torch.testing.assert_close(logits, by_hand(gpt, row), rtol=1e-4, atol=1e-4)


def test_scores_depend_on_the_distance_of_positions_alone():
    query, key = draw(5, 8, seed=1), draw(5, 8, seed=2)

    def scores(shift):
        angles = rotary_angles(torch.arange(5) + shift, 8)
        return rotate(query, angles) @ rotate(key, angles).T

    torch.testing.assert_close(scores(0), scores(100), rtol=1e-4, atol=1e-4)
    moved = rotate(query, rotary_angles(torch.arange(5) + 1, 8)) @ rotate(key, rotary_angles(torch.arange(5), 8)).T
    assert not torch.allclose(scores(0), moved, atol=0.1)


def test_the_initialization_is_that_of_gpt_2():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gpt = GPT(1000, 64, 8, 4)
    for name, parameter in gpt.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones(64)), name
        else:
            expected = 0.02 / 4 if name.endswith("outward.weight") else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name
    ids = tokens(4, 16)
    loss = F.cross_entropy(gpt(ids).flatten(0, 1), ids.flatten()).item()
    assert loss == pytest.approx(math.log(1000), rel=0.02)


def test_bfloat16_leaves_parameters_gradients_and_logits_in_float32():
    exact, half, ids = model(), model(dtype="bfloat16"), tokens(2, 9)
    logits = half(ids)
    assert logits.dtype == torch.float32
    logits.square().sum().backward()
    assert {(p.dtype, p.grad.dtype) for p in half.parameters()} == {(torch.float32, torch.float32)}
    difference = (logits - exact(ids)).norm() / logits.norm()
    assert 1e-4 < difference.item() < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_attention_can_be_flash_attention(dtype):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torch's for the CPU; it refuses what it cannot do
        assert model(dtype=dtype)(tokens(2, 9)).isfinite().all()


def test_tied_weights_stay_tied_through_training_and_export(tmp_path):
    def train(world):
        gpt = model(seed=world.rank, tied=True)
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=0.01)
        gossip = distribute(gpt, optimizer, DPSGD(), ring, world=world)
        for step in range(3):
            ids = tokens(4, 9, seed=10 * step + world.rank)
            gossip.step(lambda ids=ids: F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))
        assert gpt.head.weight is gpt.embedding.weight
        gossip.save(tmp_path)
        return gossip.averaged_state_dict(), gossip.local.spec.numel

    (expected, numel), _ = loopback.run(2, train)
    assert numel == sum(p.numel() for p in model(tied=True).parameters())
    exported = export.mean_model(Checkpoints(tmp_path).latest())
    assert exported["head.weight"] is exported["embedding.weight"]
    fresh = model(seed=5, tied=True)
    fresh.load_state_dict(exported, strict=True)
    for name, tensor in expected.items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
