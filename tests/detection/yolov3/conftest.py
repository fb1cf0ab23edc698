"""Fixtures of YOLOv3's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from detection.config import get_cfg, merge_file

CONFIGS = Path(__file__).resolve().parents[3] / "detection" / "configs"


@pytest.fixture(scope="session")
def build() -> Callable[..., nn.Module]:
    """Builds the model of a configuration of ours, on the CPU and in float32, with keys of `MODEL` replaced."""

    def build_from(name: str, *options: object) -> nn.Module:
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / f"{name}.yaml")
        cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
        torch.manual_seed(0)
        return build_model(cfg)

    return build_from
