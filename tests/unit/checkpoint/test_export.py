"""The averaged model of a checkpoint, as other programs load it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from support import tied
from support.tied import Tied
from torch import nn

from mpicomp.algorithms import DPSGD
from mpicomp.checkpoint import export
from mpicomp.checkpoint.folder import Checkpoints
from mpicomp.exchange import loopback
from mpicomp.replica.distribute import distribute
from mpicomp.topology import ring

ALIASES = {"again.weight": "middle.weight", "again.bias": "middle.bias", "head.weight": "embedding.weight"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of a model with tied weights, and the averaged model as the ranks had it in memory."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def serve(world):
        gossip = tied.train(world)
        gossip.save(folder)
        return gossip.averaged_state_dict()

    expected = loopback.run(3, serve)[0]
    return Checkpoints(folder).latest(), expected


def assert_equal(model, expected):
    assert model.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(model[name], tensor), name


def test_the_mean_model_is_the_averaged_state_dict_with_all_names(stored):
    checkpoint, expected = stored
    model = export.mean_model(checkpoint)
    assert_equal(model, expected)
    for name, other in ALIASES.items():
        assert model[name] is model[other]


def test_a_pt_file_loads_strictly_and_stores_a_tied_tensor_once(stored, tmp_path):
    checkpoint, expected = stored
    export.save(export.mean_model(checkpoint), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt")
    assert all(loaded[name].data_ptr() == loaded[other].data_ptr() for name, other in ALIASES.items())
    model = Tied()
    model.load_state_dict(loaded, strict=True)
    assert_equal(model.state_dict(), expected)


def test_a_safetensors_file_loads_strictly_as_safetensors_means_it(stored, tmp_path):
    checkpoint, expected = stored
    path = tmp_path / "model.safetensors"
    export.save(export.mean_model(checkpoint), path)
    assert load_file(path).keys() == expected.keys() - ALIASES.keys()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {**ALIASES, "format": "pt"}
    model = Tied()
    assert load_model(model, path, strict=True) == (set(), [])
    assert_equal(model.state_dict(), expected)


def test_transformers_loads_a_safetensors_file_with_tied_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    expected = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
    expected["lm_head.weight"] = expected["transformer.wte.weight"]
    config.save_pretrained(tmp_path)
    export.save(expected, tmp_path / "model.safetensors")
    loaded, notes = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_equal(loaded.state_dict(), expected)


def test_parameters_have_the_types_of_the_model(tmp_path):
    def serve(world):
        model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.LayerNorm(4), nn.Linear(4, 3).bfloat16())
        gossip = distribute(model, torch.optim.SGD(model.parameters(), lr=0.1), DPSGD(), ring, world=world)
        for step in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3 * step + world.rank))
            gossip.step(lambda x=x: model[2](model[1](model[0](x.bfloat16()).float()).bfloat16()).square().mean())
        gossip.save(tmp_path)
        return gossip.averaged_state_dict()

    expected = loopback.run(3, serve)[0]
    model = export.mean_model(Checkpoints(tmp_path).latest())
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16, torch.float32}
    assert_equal(model, expected)
    assert all(model[name].dtype == tensor.dtype for name, tensor in expected.items())
