"""What the machine is taken for: its precision, and a driver that PyTorch is too new for."""

import pytest
import torch
from torch import nn

from common import runtime
from tests.pretended_gpu import pretended_gpu


@pytest.mark.parametrize(
    ("bfloat16", "capability", "expected"),
    [(True, (8, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (7, 0), "float16"), (False, (6, 1), "float32")],
)
def test_auto_is_what_the_gpu_has_in_hardware(monkeypatch, bfloat16, capability, expected):
    device = torch.device("cuda")
    with pretended_gpu(bfloat16=bfloat16):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        assert runtime.fastest_precision(device) == expected
        assert runtime.gradient_scaler(device, "auto").is_enabled() == (expected == "float16")
        with runtime.autocast(device, "auto"):
            assert nn.Linear(2, 2).to(device)(torch.ones(1, 2, device=device)).dtype == getattr(torch, expected)


def test_a_driver_too_old_for_torch_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for driver, expected in ((11040, 1), (12020, 0), (13000, 0), (0, 0)):
        monkeypatch.setattr(runtime, "_driver_version", lambda driver=driver: driver)
        runtime._warn_of_old_driver.cache_clear()
        caplog.clear()
        assert [runtime.default_device(), runtime.default_device()] == ["cpu", "cpu"]
        assert len(caplog.messages) == expected
        assert all("CUDA 11.4" in line and "CUDA 12.8" in line and "\n" not in line for line in caplog.messages)
    runtime._warn_of_old_driver.cache_clear()
