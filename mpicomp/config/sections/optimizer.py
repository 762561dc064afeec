"""The local step and its learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from mpicomp.config.parameters import Choice
from mpicomp.config.schedule import SCHEDULES, LearningRateSchedule
from mpicomp.config.sections.base import Section, Values
from mpicomp.config.sections.run import TrainingSection
from mpicomp.errors import ConfigError
from mpicomp.replica.several_optimizers import SeveralOptimizers

_UNSUPPORTED = {"lbfgs", "sparseadam"}
"""Optimizers that need a closure or sparse gradients, which the training loop does not have."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): optimizer
    for name, optimizer in vars(torch.optim).items()
    if isinstance(optimizer, type)
    and issubclass(optimizer, torch.optim.Optimizer)
    and optimizer is not torch.optim.Optimizer
    and name.lower() not in _UNSUPPORTED
}
"""The values of ``optimizer.kind``: the classes of `torch.optim` in lower case."""


class OptimizerSection(Section):
    """``[optimizer]``: the local step, by a class of `torch.optim` other than LBFGS and SparseAdam."""

    section: ClassVar[str] = "optimizer"
    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(OPTIMIZERS, 1)}

    kind: str = "sgd"
    lr: float = Field(gt=0, allow_inf_nan=False)
    """The learning rate, required; ``[schedule]`` changes it over the run."""

    decay_1d: bool = True
    """Whether weight decay also holds for biases and the scales of normalizations, as in plain `torch.optim`."""

    adamw_lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With ``kind = "muon"``, the learning rate of AdamW, which trains all but the matrices of hidden layers; by
    default `lr`."""

    @classmethod
    def normalized(cls, name: str) -> str:
        """Return `name` in lower case, so that names of `torch.optim` are accepted as they are."""
        return name if ":" in name else name.lower()

    @field_validator("kind")
    @classmethod
    def _lower(cls, kind: str) -> str:
        return cls.normalized(kind)

    @model_validator(mode="after")
    def _adamw_beside_muon(self) -> OptimizerSection:
        if self.adamw_lr is not None and self.kind != "muon":
            raise ValueError(f"has adamw_lr, which is for optimizer.kind = 'muon', not {self.kind!r}: leave it out")
        return self

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the trainable parameters of `model`."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return self._muon(model, trained) if self.kind == "muon" else self.over(self._groups(trained))

    def _muon(self, model: nn.Module, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Muon for the matrices of hidden layers, and AdamW for the rest."""
        matrices = _hidden_matrices(model)
        if not matrices:
            raise ConfigError("optimizer.kind = 'muon': the model has no linear layer but its last one: use 'adamw'")
        muon, others = self.over([{"params": matrices}]), [p for p in trained if all(p is not q for q in matrices)]
        if not others:
            return muon
        decay = self.arguments()["weight_decay"]
        adamw = torch.optim.AdamW(self._groups(others), lr=self.adamw_lr or self.lr, weight_decay=decay)
        return SeveralOptimizers([muon, adamw])

    def _groups(self, parameters: list[nn.Parameter]) -> list[Values]:
        """Return the groups of `parameters`."""
        groups: list[Values] = [{"params": parameters}]
        if not self.decay_1d:
            groups = [{"params": [p for p in parameters if p.ndim > 1]}]
            groups += [{"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def over(self, groups: list[Values]) -> torch.optim.Optimizer:
        """Return the optimizer over groups of parameters; raise ConfigError if it refuses a value or a group."""
        optimizer: torch.optim.Optimizer = self.make(torch.optim.Optimizer, groups)
        return optimizer

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the optimizer over a matrix, as a check; some optimizers accept only matrices."""
        self.over([{"params": [torch.zeros(1, 1, requires_grad=True)]}])


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers of `model`, but not of the last one, nor those that an embedding has."""
    linear = [id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
    embeddings = [id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)]
    hidden = set(linear[:-1]) - set(linear[-1:]) - set(embeddings)
    return [p for p in model.parameters() if p.requires_grad and id(p) in hidden]


class ScheduleSection(Section):
    """``[schedule]``: the learning rate over time."""

    section: ClassVar[str] = "schedule"
    choices: ClassVar[Mapping[str, Choice]] = {"kind": Choice(SCHEDULES, 1)}

    kind: str = "constant"

    def build(self, total_epochs: float) -> LearningRateSchedule:
        """Return the factor of ``optimizer.lr`` as a function of the epoch, for a run of `total_epochs`."""
        schedule: LearningRateSchedule = self.make(LearningRateSchedule, total_epochs)
        return schedule

    def try_out(self, others: Mapping[str, Section]) -> None:
        """Build the schedule, as a check, if the length of the run is given in epochs."""
        training = others.get("training")
        if isinstance(training, TrainingSection) and training.epochs is not None:
            self.build(training.epochs)
