"""Where a model is and is moved to. A rank on torch's device "meta" stands for one with a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mpicomp.errors import ConfigError
from mpicomp.replica.device import device_of, place

ELSEWHERE = SimpleNamespace(rank=0, size=1, device=torch.device("meta"), all_gather=lambda value: [value])
HERE = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), all_gather=lambda value: [value])


def make():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_model_on_the_cpu_is_trained_there_whatever_gpus_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert device_of(make()[0]) == "cpu"


def test_it_is_left_where_it_is_and_moved_on_request():
    model, optimizer = make()
    place(model, optimizer, HERE, is_moved=False)
    with pytest.raises(ConfigError, match=r"the model is on cpu, but this rank trains on meta: .* device = 'cuda'"):
        place(model, optimizer, ELSEWHERE, is_moved=False)
    place(model, optimizer, ELSEWHERE, is_moved=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_it_is_not_moved_away_from_the_state_of_its_optimizer():
    model, optimizer = make()
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match="the optimizer has state on another device than meta"):
        place(model, optimizer, ELSEWHERE, is_moved=True)
