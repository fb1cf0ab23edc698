"""Fixtures of YOLOv3's tests."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """Builds the model of a configuration of ours, on the CPU and in float32, with keys of `MODEL` replaced."""

    def build_from(name: str, *options: object) -> nn.Module:
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / f"{name}.yaml")
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.PRECISION", "float32", *options])
        torch.manual_seed(0)
        return build_model(cfg)

    return build_from
