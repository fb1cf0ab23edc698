"""What the machine is taken for: its precision, and a driver that PyTorch is too new for."""

import pytest
import torch
from torch import nn

from common import runtime
from common.run_folder import machine
from tests.pretended_gpu import pretended_gpu


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", (8, 0), "bfloat16"),
        ("Tesla T4", (7, 5), "float16"),
        ("Tesla V100-SXM2-16GB", (7, 0), "float16"),
        ("NVIDIA GeForce GTX 1660 Ti", (7, 5), "float32"),
        ("NVIDIA T1200 Laptop GPU", (7, 5), "float32"),
        ("NVIDIA GeForce GTX 1080", (6, 1), "float32"),
    ],
)
def test_auto_is_what_the_gpu_has_in_hardware(monkeypatch, name, capability, expected):
    device = torch.device("cuda")
    with pretended_gpu(bfloat16=expected == "bfloat16"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        assert runtime.fastest_precision(device) == expected
        assert runtime.gradient_scaler(device, "auto").is_enabled() == (expected == "float16")
        with runtime.autocast(device, "auto"):
            assert nn.Linear(2, 2).to(device)(torch.ones(1, 2, device=device)).dtype == getattr(torch, expected)


def test_unlike_gpus_that_train_together_compute_alike(monkeypatch):
    capabilities = {0: (8, 6), 1: (7, 5)}
    with pretended_gpu(2):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
        for rank in (0, 1):  # each on its own
            alone = runtime.fastest_precision(torch.device("cuda", rank))
            assert alone == ("float16" if rank else "bfloat16")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert {runtime.fastest_precision(torch.device("cuda", rank)) for rank in (0, 1)} == {"float16"}


def test_a_gpu_that_torch_is_not_built_for_is_left_alone(monkeypatch, caplog):
    capabilities = {0: (8, 6), 1: (6, 1)}
    runtime._is_supported.cache_clear()
    with pretended_gpu(2):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert (runtime.gpu_count(), runtime.visible_gpus(), runtime.default_device()) == (1, ["3"], "cuda")
        (line,) = caplog.messages
        assert "Pretended GPU 1 has compute capability 6.1 and PyTorch is built for 7.5" in line and "\n" not in line
        # In the order of their slots it may come first; the one behind it would have its number.
        runtime._is_supported.cache_clear()
        capabilities[0], capabilities[1] = capabilities[1], capabilities[0]
        assert (runtime.gpu_count(), runtime.visible_gpus(), runtime.default_device()) == (0, [], "cpu")
        assert "or leave it out: CUDA_VISIBLE_DEVICES" in caplog.messages[-1]
    runtime._is_supported.cache_clear()


def test_gpus_that_the_driver_alone_counts_are_none(monkeypatch):
    """NVML counts them whatever PyTorch says of the driver, and asking for their names would fail."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (runtime.gpu_count(), runtime.visible_gpus(), runtime.default_device()) == (0, [], "cpu")
    assert machine().endswith(" GB")


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
