"""The configuration: what is accepted, what is filled in, and the text of what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from mpicomp.algorithms import ALGORITHMS, DPSGD, Choco, DiLoCo, LocalSGD
from mpicomp.compression import COMPRESSORS, Cast, ErrorFeedback, PerTensor, TopK
from mpicomp.config.config import RunConfig
from mpicomp.config.parameters import Choice
from mpicomp.config.schedule import SCHEDULES
from mpicomp.config.sections import OPTIMIZERS, SECTIONS, CompressionSection
from mpicomp.data.datasets import DATASETS
from mpicomp.errors import ConfigError, TopologyError
from mpicomp.models import MODELS
from mpicomp.topology import TOPOLOGIES

SMALL = """
[optimizer]
lr = 0.1
[training]
epochs = 2
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(SMALL)
    return lambda *overrides: RunConfig.load(path, overrides)


def refusal(load, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value).partition(": ")[2]


TOPK = ("algorithm.kind=choco", "algorithm.gamma=0.1", "compression.kind=topk", "compression.ratio=0.1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("compression.allocation=dagc",), "compression.allocation = 'dagc' gives each rank a ratio or a threshold"),
        ((*TOPK, "compression.allocation=dacg"), "compression.allocation = 'dacg' must be 'uniform', 'dagc'"),
        (("compression.allocation=bandwidth",), "'bandwidth' gives each rank a ratio of its own, and this compressor"),
        (
            (*TOPK, "compression.bandwidths=[1, 2]"),
            "compression.bandwidths has no use with compression.allocation = 'u",
        ),
        (
            (*TOPK, "compression.allocation=bandwidth", "compression.bandwidths=[1.0, -2.0]"),
            "compression.bandwidths = [1.0, -2.0] (entry 1) must be greater than 0",
        ),
        (
            (*TOPK, "downlink.allocation=dagc"),
            "downlink.allocation is unknown. Did you mean 'compression.allocation'?",
        ),
    ],
)
def test_an_allocation_that_has_no_sense_is_refused(load, overrides, message):
    assert message in refusal(load, *overrides)


def test_an_allocation_survives_its_file(load):
    config = load(*TOPK, "compression.allocation=dagc")
    assert config.compression.allocation == "dagc"
    assert RunConfig.from_toml(config.to_toml()) == config
    assert load().compression.allocation == "uniform"


def test_a_small_file_is_enough(load):
    config = load()
    assert (config.run.seed, config.run.device, config.run.log_every) == (0, "auto", 10)
    assert (config.data.kind, config.data.partition) == ("digits", "iid")
    assert (config.topology.kind, config.compression.kind) == ("ring", "identity")
    assert (config.training.epochs, config.training.steps, config.training.batch_size) == (2, None, 32)


ADAGOSSIP = ("algorithm.kind=adagossip", "algorithm.gamma=0.01", "compression.kind=topk", "compression.ratio=0.1")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ADAGOSSIP,
        (*ADAGOSSIP, "algorithm.gamma_clip=inf", "compression.per_tensor=true"),
        ("training.steps=7", "optimizer.kind=AdamW", "optimizer.betas=[0.8, 0.9]"),
        ("topology.kind=torus", "topology.dims=[2, 2]", "schedule.kind=step", "schedule.milestones=[0.5]"),
        ("data.kind=tinyshakespeare", "data.path=some'where", "model.kind=gpt"),
        ("data.partition=volumes", "data.skew=2", "model.hidden=[8, 8]"),
    ],
)
def test_the_resolved_configuration_loads_back_equal(load, overrides):
    config = load(*overrides)
    text = config.to_toml()
    again = RunConfig.from_toml(text)
    assert again == config
    assert again.to_toml() == text


def test_different_configurations_are_not_equal(load):
    assert load() != load("run.seed=1")
    assert load() != load("optimizer.kind=adam")


def test_every_default_is_written(load):
    text = load(*ADAGOSSIP, "schedule.kind=cosine", "data.partition=dirichlet").to_toml()
    for line in ("beta = 0.999", "gamma_clip = 1.0", "floor = 0.0", "momentum = 0.0", 'weights = "metropolis"'):
        assert line in text
    assert "alpha = 1.0" in text


def test_values_on_the_command_line_are_toml_or_text(load):
    config = load(
        "run.device=cpu", 'data.path="a b"', "optimizer.lr=1", "optimizer.nesterov=true", "optimizer.momentum=0.9"
    )
    assert config.run.device == "cpu"
    assert config.data.path == "a b"
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.optimizer.nesterov is True


def test_local_sgd_goes_around_the_inner_algorithm(load):
    topk = ("compression.kind=topk", "compression.ratio=0.1")
    settings = ("algorithm.period=3", "algorithm.gamma=0.3", "algorithm.start=zero")
    config = load("algorithm.kind=local_sgd", "algorithm.inner=choco", *settings, *topk)
    assert config.check(4)[1] == LocalSGD(3, Choco(0.3, TopK(0.1), start="zero"))
    assert RunConfig.from_toml(config.to_toml()) == config
    assert load("algorithm.kind=local_sgd").check(4)[1] == LocalSGD(4, DPSGD())
    half = load("algorithm.kind=local_sgd", "algorithm.inner=dpsgd", "algorithm.gamma=0.5", "compression.kind=cast")
    assert half.check(4)[1] == LocalSGD(4, DPSGD(gamma=0.5, compressor=Cast()))


def test_diloco_goes_around_an_inner_algorithm_or_none(load):
    assert load("algorithm.kind=diloco", "algorithm.period=3").check(4)[1] == DiLoCo(3)
    settings = ("algorithm.inner=choco", "algorithm.gamma=0.3", "compression.kind=topk", "compression.ratio=0.1")
    config = load("algorithm.kind=diloco", "algorithm.period=3", *settings)
    assert config.check(4)[1] == DiLoCo(3, inner=Choco(0.3, TopK(0.1)))
    assert RunConfig.from_toml(config.to_toml()) == config
    plain = load("algorithm.kind=diloco", "algorithm.inner=dpsgd", "compression.kind=cast")
    assert plain.check(4)[1] == DiLoCo(inner=DPSGD(compressor=Cast()))


def test_an_empty_value_removes_a_key(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(SMALL + "[topology]\nkind = 'torus'\nndim = 2\n")
    assert RunConfig.load(path, ["topology.kind=ring", "topology.ndim="]).topology.kind == "ring"


def test_steps_take_the_place_of_epochs(load):
    config = load("training.steps=5")
    assert (config.training.epochs, config.training.steps) == (None, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rate=1"], "optimizer.learning_rate is unknown. Did you mean 'optimizer.lr'?"),
        (["optimizer.momentun=1"], "optimizer.momentun is unknown. Did you mean 'optimizer.momentum'?"),
        (["training.lr=1"], "training.lr is unknown. Did you mean 'optimizer.lr'?"),
        (["training.zzz=1"], "training.zzz is unknown. Known: epochs, steps, batch_size, clip_norm."),
        (["modle.kind=mlp"], "modle is unknown. Did you mean 'model'?"),
        (["lr.x=1"], "lr is unknown. Did you mean 'optimizer.lr'?"),
        (["zzz.x=1"], "zzz is unknown. Sections: run, data, model, topology,"),
        (["data.alpha=1"], "It belongs to data.partition = 'dirichlet' or data.partition = 'volumes'."),
        (["topology.kind=rink"], "topology.kind = 'rink' is unknown. Did you mean 'ring'? Known: chain, complete,"),
        (["model.kind=3"], "model.kind = 3 must be a name: logistic, mlp,"),
        (["run.device=gpu"], "run.device = 'gpu' must be 'auto', 'cpu' or 'cuda'. Did you mean 'cpu'?"),
        (["run.log_every=0"], "run.log_every = 0 must be greater than 0"),
        (["run.seed=-1"], "run.seed = -1 must be greater than or equal to 0"),
        (["optimizer.lr=fast"], "optimizer.lr = 'fast' must be a valid number"),
        (["optimizer.lr=0"], "optimizer.lr = 0 must be greater than 0"),
        (["optimizer.lr=nan"], "optimizer.lr = nan must be a finite number"),
        (["optimizer.lr="], "optimizer.lr is missing and has no default"),
        (["algorithm.kind=motef"], "algorithm.gamma is missing: algorithm.kind = 'motef' needs it"),
        (
            ["algorithm.kind=local_sgd", "algorithm.inner=adagossip"],
            "algorithm.gamma is missing: algorithm.inner = 'adagossip' needs it",
        ),
        (
            ["algorithm.kind=local_sgd", "algorithm.inner=ef_sgd"],
            "algorithm.inner = 'ef_sgd' is unknown. Known: adagossip, choco, deep_squeeze, def_atc, dpsgd, "
            "power_gossip.",
        ),
        (
            ["algorithm.inner=choco", "algorithm.gamma=0.1"],
            "algorithm.inner = 'choco': algorithm.kind = 'dpsgd' does not go around another algorithm. Leave",
        ),
        (
            ["algorithm.kind=local_sgd", "algorithm.inner=choco", "algorithm.gamma=0.1", "algorithm.overlap=true"],
            "algorithm.overlap = true: Choco would send behind one gradient, and local steps take several",
        ),
        (
            ["algorithm.kind=diloco", "compression.kind=topk", "compression.ratio=0.1"],
            "algorithm.kind = 'diloco' has no use for the section [compression], so leave it out",
        ),
        (["algorithm.kind=diloco", "algorithm.outer_lr=0"], "algorithm.outer_lr = 0.0 must be a finite number > 0"),
        (
            ["algorithm.kind=local_sgd", "compression.kind=topk", "compression.ratio=0.1"],
            "compression.kind = 'TopK' would not converge. Use 'identity' or 'cast', or 'choco',",
        ),
        (["topology.lazy=1"], "topology.lazy = 1 must be a valid boolean"),
        (["model.hidden=[8, 'x']"], "model.hidden = [8, 'x'] (entry 1) must be a valid integer"),
        (["training.epochs="], "training needs exactly one of training.epochs and training.steps"),
        (["training.epochs=1", "training.steps=1", "training.steps="], "training needs exactly one of"),
        (["optimizer.nesterov=true"], "optimizer.kind = 'sgd': Nesterov momentum requires a momentum"),
        (["schedule.warmup=3"], "schedule.warmup = 3: must be between 0 and the 2 epochs of the run."),
        (["algorithm.gamma=-1"], "algorithm.gamma = -1.0 must be a finite number > 0"),
        (["nonsense"], "--set nonsense: must have the form section.key=value, e.g. --set optimizer.lr=0.1"),
        (["lr=0.1"], "--set lr=0.1: must have the form section.key=value"),
        (["optimizer.kind=lbfgs"], "optimizer.kind = 'lbfgs' is unknown."),
        (["optimizer.adamw_lr=0.1"], "optimizer has adamw_lr, which is for optimizer.kind = 'muon', not 'sgd'"),
    ],
)
def test_what_is_wrong_is_named(load, overrides, message):
    assert message in refusal(load, *overrides)
    assert "\n" not in refusal(load, *overrides)


@pytest.mark.parametrize("ratio", [0, 1.5, -0.1])
def test_an_impossible_ratio_is_refused(load, ratio):
    assert "compression.ratio" in refusal(load, *ADAGOSSIP, f"compression.ratio={ratio}")


def test_all_problems_are_found_at_once(load):
    overrides = ["optimizer.learning_rate=1", "topology.kind=rink", "run.log_every=0", "algorithm.gamma=0", "modle.a=1"]
    first, *lines = refusal(load, *overrides).splitlines()
    assert first == "5 problems"
    for key in ("modle", "run.log_every", "topology.kind", "optimizer.learning_rate", "algorithm.gamma"):
        assert sum(line.strip().startswith(key) for line in lines) == 1


def test_a_compressor_without_use_is_refused(load):
    message = refusal(load, "algorithm.kind=ssgd", "compression.kind=topk", "compression.ratio=0.1")
    assert "algorithm.kind = 'ssgd' has no use for the section [compression]" in message
    assert "compression.kind = 'identity'" in message


def test_a_section_must_be_a_table(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("model = 'mlp'\n" + SMALL)
    with pytest.raises(ConfigError, match=r"model = 'mlp' must be a section: \[model\]"):
        RunConfig.load(path)


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"run.toml: there is no such file"):
        RunConfig.load(path)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        RunConfig.load(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        RunConfig.load(path)
    path.write_text("[run\nseed = 1")
    with pytest.raises(ConfigError, match=r"is not TOML: .*line 1"):
        RunConfig.load(path)


def test_sections_build_what_they_say(load):
    config = load(*ADAGOSSIP, "data.partition=dirichlet")
    assert config.topology.build(5).size == 5
    assert load(*ADAGOSSIP).algorithm.build(TopK(ratio=0.5)).compressor == TopK(ratio=0.5)
    assert config.schedule.build(2.0)(1.0) == 1.0
    dataset = config.data.load()
    assert sum(map(len, config.data.split(dataset.train_labels, 3, seed=0))) == len(dataset.train)
    model = config.model.build(dataset, seed=0)
    inputs, _ = dataset.batch("train", np.arange(2))
    assert model(inputs).shape == (2, 10)


def test_feedback_goes_around_all_tensors():
    values = {"kind": "topk", "ratio": 0.1, "per_tensor": True, "error_feedback": True}
    section = CompressionSection.specialized(values)(**values)
    assert section.build() == ErrorFeedback(PerTensor(TopK(ratio=0.1)))


def test_check_names_what_does_not_fit_the_ranks(load):
    with pytest.raises(TopologyError, match=r"hypercube.* not 6"):
        load("topology.kind=hypercube").check(6)
    with pytest.raises(TopologyError, match="directed"):
        load(*ADAGOSSIP, "topology.kind=exponential").check(8)
    with pytest.raises(ConfigError, match="one rank"):
        load("algorithm.kind=sgd").check(2)
    schedule, algorithm = load(*ADAGOSSIP).check(4)
    assert schedule.size == 4
    assert algorithm.compressor == TopK(ratio=0.1)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS.keys() - {"muon"}))
def test_every_optimizer_of_torch_can_be_chosen(load, kind):
    config = load(f"optimizer.kind={kind}", "optimizer.lr=0.5")
    optimizer = config.optimizer.build(nn.Linear(3, 2, bias=False))
    assert type(optimizer).__name__.lower() == kind
    assert optimizer.param_groups[0]["lr"] == 0.5


class Written(nn.Module):
    """With all that is not for Muon: an embedding that is the last layer, too, vectors, and a convolution."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.inward, self.outward = nn.Embedding(7, 4), nn.Linear(4, 8), nn.Linear(8, 4)
        self.convolution, self.norm, self.head = nn.Conv1d(4, 4, 3), nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("tied", [True, False])
def test_muon_has_the_matrices_of_hidden_layers_and_adamw_the_rest(load, tied):
    settings = ("optimizer.kind=Muon", "optimizer.lr=0.02", "optimizer.decay_1d=false", "optimizer.weight_decay=0.1")
    model = Written(tied)
    muon, adamw = load(*settings, "optimizer.adamw_lr=0.003").optimizer.build(model).optimizers
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model.inward.weight), id(model.outward.weight)]
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names[id(p)] for p in group["params"]] for group in adamw.param_groups]
    assert held[0] == ["embedding.weight", "convolution.weight", *([] if tied else ["head.weight"])]
    assert sorted(names.values()) == sorted(["inward.weight", "outward.weight", *held[0], *held[1]])
    assert [(g["lr"], g["weight_decay"]) for g in adamw.param_groups] == [(0.003, 0.1), (0.003, 0.0)]
    assert muon.param_groups[0]["lr"] == 0.02
    *_, adamw = load(*settings).optimizer.build(model).optimizers
    assert adamw.param_groups[0]["lr"] == 0.02


def test_muon_has_no_adamw_where_all_is_matrices_and_needs_one(load):
    config = load("optimizer.kind=muon").optimizer
    with pytest.raises(ConfigError, match="the model has no linear layer but its last one: use 'adamw'"):
        config.build(nn.Linear(3, 2))
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[1].weight.requires_grad_(False)
    assert type(config.build(model)) is torch.optim.Muon


def test_optimizers_are_named_in_any_case(load):
    assert load("optimizer.kind=AdamW") == load("optimizer.kind=adamw")


def test_weight_decay_may_spare_biases(load):
    model = nn.Linear(3, 2)
    both = load("optimizer.weight_decay=0.1").optimizer.build(model)
    assert [group["weight_decay"] for group in both.param_groups] == [0.1]
    spared = load("optimizer.weight_decay=0.1", "optimizer.decay_1d=false").optimizer.build(model)
    assert [(len(g["params"]), g["weight_decay"]) for g in spared.param_groups] == [(1, 0.1), (1, 0.0)]


def test_frozen_parameters_are_left_out(load):
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert len(load().optimizer.build(model).param_groups[0]["params"]) == 1


def test_sections_are_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load().run.seed = 3


@pytest.mark.parametrize("registry", [TOPOLOGIES, COMPRESSORS, ALGORITHMS, DATASETS, MODELS, SCHEDULES, OPTIMIZERS])
def test_every_entry_of_a_registry_can_be_configured(registry):
    choices = [c for section in SECTIONS.values() for c in section.choices.values() if c.registry is registry]
    (parameters,) = {(choice.given, choice.beside): choice.parameters for choice in choices}.values()
    for target in registry.values():
        for name in parameters(target):
            assert name not in ("size", "compressor", "downlink", "kind", "epochs")


# Types ------------------------------------------------------------------------------------------


def test_only_what_toml_can_say_becomes_a_parameter():
    def target(
        given,
        number: float | torch.Tensor = 0,
        pair: tuple[float | torch.Tensor, float] = (1, 2),
        hook: nn.Module | None = None,
        either: tuple[float | None, float] = (None, 1.0),
        untyped=3,
        **more: int,
    ):
        """Mixed parameters."""

    found = Choice({}, 1).parameters(target)
    assert list(found) == ["number", "pair", "untyped"]
    assert found["number"][0] is float
    assert found["pair"][0] == tuple[float, float]
    assert found["pair"][1].default == (1.0, 2.0)
    assert found["untyped"][0] is int


def test_the_same_key_of_another_section_is_nearer_than_a_similar_one(load):
    with pytest.raises(ConfigError, match=r"Did you mean 'optimizer.weight_decay'\?"):
        load("algorithm.weight_decay=0.1")
