"""AdamW beside Detectron2's SGD: its arithmetic by hand, decay where it belongs, and going on with it."""

import copy

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from common.errors import UserError
from common.weights import resume_optimizer
from detection.config import get_cfg
from detection.optimizer import build_optimizer

RATE, DECAY = 0.01, 0.1


def make_cfg(optimizer: str = "AdamW") -> CfgNode:
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = optimizer, RATE, DECAY
    cfg.SOLVER.WEIGHT_DECAY_NORM = cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    return cfg


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def take_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(torch.arange(12.0).view(3, 1, 2, 2)).square().sum().backward()
    optimizer.step()


def test_first_step_by_hand() -> None:
    """Loshchilov and Hutter, 2019: the rate times the gradient's sign, after the decay, which weights alone have."""
    network = make_network()
    before = {name: value.clone() for name, value in network.named_parameters()}
    take_step(network, build_optimizer(make_cfg(), network))
    for name, value in network.named_parameters():
        gradient = value.grad
        assert gradient is not None
        kept = 1 - RATE * DECAY if name == "0.weight" else 1
        step = RATE * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(value, before[name] * kept - step)


def test_resumed_it_goes_on_as_if_undisturbed() -> None:
    network = make_network()
    optimizer = build_optimizer(make_cfg(), network)
    take_step(network, optimizer)
    other = copy.deepcopy(network)
    resumed = build_optimizer(make_cfg(), other)
    resume_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    take_step(network, optimizer)
    take_step(other, resumed)
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), other.parameters(), strict=True))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"SOLVER\.OPTIMIZER Lion: expected SGD or AdamW"):
        build_optimizer(make_cfg("Lion"), make_network())
