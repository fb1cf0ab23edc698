"""The pretended GPU finds planted faults, counts planted waits, and computes what the CPU computes."""

import copy
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.pretended_gpu import LOWERED, PROMOTED, pretended_gpu

ROOT = Path(__file__).resolve().parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def kinds(gpu) -> list[str]:
    return [wait.kind for wait in gpu.waits]


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 4 * 4, 5))


def train_small_net(device: torch.device, dtype: torch.dtype | None, steps: int = 3) -> tuple[list[float], nn.Module]:
    """Losses of some steps of SGD, and the network on the CPU."""
    net = small_net().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.randn(6, 3, 8, 8, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(5, (6,), generator=generator).to(device)
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = net(images)
        assert logits.dtype == (dtype or torch.float32)
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, net.cpu()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_has_the_values_of_the_cpu(dtype):
    expected, expected_net = train_small_net(CPU, dtype)
    with pretended_gpu():
        losses, net = train_small_net(CUDA, dtype)
    assert losses == pytest.approx(expected, rel=1e-6)
    for value, wanted in zip(net.state_dict().values(), expected_net.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-7)


def test_float16_is_close_to_float32_and_the_scaler_skips_infinite_gradients(gpu):
    net, images = small_net().to("cuda"), torch.randn(6, 3, 8, 8).to("cuda")
    reference = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, reference)]

    def step(factor: float) -> None:
        with torch.autocast("cuda", torch.float16):
            logits = net(images)
        assert logits.dtype == torch.float16
        optimizers[0].zero_grad()
        scaler.scale(factor * logits.float().square().mean()).backward()
        scaler.step(optimizers[0])
        scaler.update()

    step(1.0)
    reference(images).square().mean().backward()
    optimizers[1].step()
    for value, wanted in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value.cpu(), wanted.cpu(), rtol=0.02, atol=2e-3)
    before = [parameter.detach().cpu() for parameter in net.parameters()]
    step(float("inf"))
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(before, net.parameters(), strict=True))


def test_a_clean_step_waits_for_nothing_and_a_planted_item_is_found(gpu):
    model = timm.create_model("test_resnet", num_classes=5).to("cuda", memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 3, 32, 32).pin_memory()
    labels = torch.randint(5, (4,)).pin_memory()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images.to("cuda", non_blocking=True))
        loss = functional.cross_entropy(logits.float(), labels.to("cuda", non_blocking=True), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    gpu.waits.clear()
    sums = torch.zeros((), device="cuda")
    for _ in range(2):
        sums += step()
    assert gpu.waits == []
    step().item()
    line = sys._getframe().f_lineno - 1
    assert [(wait.kind, wait.operator, wait.caller) for wait in gpu.waits] == [
        ("number", "_local_scalar_dense", f"{__file__}:{line}")
    ]


X = "torch.arange(12.0, device='cuda').view(3, 4)"
REFUSED = {
    "a scalar on the CPU in stack": "torch.stack([x.sum(), torch.tensor(3)])",
    "a scalar on the CPU in cat": "torch.cat([x[0], torch.zeros(4)])",
    "two scalars on the CPU": "torch.addcmul(x, torch.tensor(1.0), torch.tensor(2.0))",
    "a vector on the CPU": "x + torch.ones(4)",
    "a scalar on the GPU with a vector on the CPU": "torch.ones(4) * x.sum()",
    "in place on the CPU": "torch.tensor(1.0).add_(x.sum())",
    "a mask on the CPU": "x.masked_fill(torch.ones(4, dtype=torch.bool), 0)",
    "values on the CPU": "x.index_put_((torch.zeros(2, dtype=torch.long, device='cuda'),), torch.ones(2, 4))",
    "an index on the GPU for a tensor on the CPU": "torch.ones(3)[torch.zeros(1, dtype=torch.long, device='cuda')]",
    "an index on the CPU for embedding": "functional.embedding(torch.zeros(1, dtype=torch.long), x)",
    "gather by an index on the CPU": "x.gather(0, torch.zeros(1, 4, dtype=torch.long))",
    "a module on the CPU": "nn.Linear(4, 2)(x)",
    "statistics on the CPU": "nn.BatchNorm1d(4)(x)",
    "boxes on the CPU": "torchvision.ops.nms(torch.ones(3, 4), x[:, 0], 0.5)",
    "a generator of the CPU": "torch.rand(2, device='cuda', generator=torch.Generator())",
    "a generator of the GPU": "torch.rand(2, generator=torch.Generator('cuda'))",
    "a GPU that isn't there": "x.to('cuda:1')",
    "pinned memory on the GPU": "x.pin_memory()",
}


@pytest.mark.parametrize("expression", REFUSED.values(), ids=REFUSED)
def test_what_cuda_refuses_is_refused(gpu, expression):
    names = globals() | {"x": eval(X)}
    with pytest.raises(RuntimeError, match=r"same device|generator|invalid device ordinal|cannot pin"):
        eval(expression, names)


def test_no_numpy_array_of_a_tensor_on_the_gpu(gpu):
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        torch.ones(2).to("cuda").numpy()


def test_a_buffer_left_on_the_cpu_is_refused(gpu):
    net = small_net().to("cuda")
    net[1].running_mean = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"same device.*cpu \(running_mean of shape \[8\]\)"):
        net(torch.ones(2, 3, 8, 8, device="cuda"))


WAITS = {
    "x + torch.tensor(2.0)": [],
    "torch.tensor(2.0) * x": [],
    "x[1:, 2]": [],
    "torch.where(x > 3, x, 0.0)": [],
    "x.__setitem__(x > 3, 0.0)": [],
    "x.__setitem__(slice(1, 2), 0.0)": [],
    "x.masked_fill_(x > 3, 0.0)": [],
    "x[torch.zeros(2, dtype=torch.long, device='cuda')]": [],
    "x.repeat_interleave(torch.tensor([1, 0, 2]).pin_memory().to('cuda', non_blocking=True), 0, output_size=3)": [],
    "torch.full((2,), 3.0, device='cuda')": [],
    "x.to('cpu', non_blocking=True)": [],
    "torch.zeros(3, 4).pin_memory().copy_(x, non_blocking=True)": [],
    "x.copy_(torch.zeros(3, 4).pin_memory()[:], non_blocking=True)": [],
    "x.sum().item()": ["number"],
    "bool((x > 3).any())": ["number"],
    "float(x.sum())": ["number"],
    "f'{x.sum():.2f}'": ["number"],
    "x[x.sum().long() * 0]": ["number"],
    "torch.equal(x, x)": ["number"],
    "torch.tensor([x.sum(), x.mean()])": ["number", "number"],
    "x.masked_fill_(x > 3, x.sum())": ["number"],
    "x[x > 3]": ["size"],
    "x.__setitem__(x > 3, x.sum())": ["size"],
    "(x > 3).nonzero()": ["size"],
    "torch.where(x > 3)": ["size"],
    "x.masked_select(x > 3)": ["size"],
    "x.unique()": ["size"],
    "torch.repeat_interleave(x[0].long())": ["size"],
    "torchvision.ops.nms(x, x[:, 0], 0.5)": ["size"],
    "x.tolist()": ["copy to the host"],
    "x.cpu()": ["copy to the host"],
    "str(x)": ["copy to the host"],
    "torch.zeros(3, 4).copy_(x, non_blocking=True)": ["copy to the host"],
    "torch.ones(2).to('cuda')": ["copy to the GPU"],
    "torch.ones(2).cuda(non_blocking=True)": ["copy to the GPU"],
    "torch.ones(2).pin_memory().to('cuda')": ["copy to the GPU"],
    "torch.tensor([1, 2], device='cuda')": ["copy to the GPU"],
    "x.new_tensor([1, 2])": ["copy to the GPU"],
    "x[torch.tensor([0, 1])]": ["copy to the GPU"],
    "x[[0, 1]]": ["copy to the GPU"],
    "x[torch.tensor([True, False, True])]": ["copy to the GPU"],
    "x.__setitem__(torch.zeros(2, dtype=torch.long, device='cuda'), 1)": ["copy to the GPU"],
    "x[0].__setitem__(0, 1.0)": ["copy to the GPU"],
    "torch.where(x > 3, x, torch.tensor(0.0))": ["copy to the GPU"],
    "torch.cuda.synchronize()": ["synchronize"],
    "torch.cuda.Event().synchronize()": ["synchronize"],
}


@pytest.mark.parametrize(("expression", "expected"), WAITS.items(), ids=WAITS)
def test_waits_are_counted_by_kind(gpu, expression, expected):
    names = globals() | {"x": eval(X)}
    gpu.waits.clear()
    eval(expression, names)
    assert kinds(gpu) == expected


def test_a_wait_of_the_backward_pass_has_the_line_that_asked_for_it(gpu):
    x = torch.ones(4, device="cuda", requires_grad=True)
    loss = x[x > 0].sum()
    gpu.waits.clear()
    loss.backward()
    assert [(w.kind, w.caller) for w in gpu.waits] == [("size", f"{__file__}:{sys._getframe().f_lineno - 1}")]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([2, 0])],
        lambda x: x[:, [1, 3]].unsqueeze_(0).squeeze_(),
        lambda x: x.index_add(0, torch.tensor([1, 1], device=x.device), x[:2]),
        lambda x: functional.interpolate(x[None, None], scale_factor=2, mode="bilinear"),
        lambda x: torch.cat([x.softmax(1), x.sort(1).values, x.cumsum(0)]),
        lambda x: x.clone().resize_(2, 4),
        lambda x: x[0].clone().resize_(4096)[:4],
        lambda x: torch.where(x > 0, x, 0.0).topk(2).values,
        lambda x: torchvision.ops.batched_nms(x.abs().cumsum(1), x[:, 0], (x[:, 1] > 0).long(), 0.5),
        lambda x: torchvision.ops.roi_align(x[None, None], [x[:, :4].abs().cumsum(1)], 2, aligned=True),
    ],
)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operators_have_the_values_of_the_cpu(gpu, compute: Callable[[Tensor], Tensor], context):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with context():
        result = compute(x.to("cuda"))
        assert result.device == CUDA
        torch.testing.assert_close(result.cpu(), compute(x))


def test_modules_move_without_new_parameters_and_keep_ties_and_strides(gpu):
    net = small_net()
    tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    parameters = list(net.parameters())
    assert all(a is b for a, b in zip(parameters, net.to("cuda").parameters(), strict=True))
    assert tied.to("cuda")["a"].weight is tied["b"].weight
    net.to(memory_format=torch.channels_last)
    assert parameters[0].is_contiguous(memory_format=torch.channels_last)
    features = net[:3](torch.ones(2, 3, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert not features.is_contiguous()
    copied = copy.deepcopy(net)
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied[0].weight.device == CUDA
    assert torch.equal(copied[0].weight, net[0].weight)
    assert copied[0].weight is not net[0].weight


@pytest.mark.parametrize("weights_only", [True, False])
def test_checkpoints_say_where_their_tensors_were(weights_only):
    file = io.BytesIO()
    with pretended_gpu():
        net = small_net().to("cuda")
        torch.save({"model": net.state_dict(), "step": torch.tensor(3)}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        assert loaded["model"]["0.weight"].device == CUDA
        assert loaded["step"].device == CPU
        file.seek(0)
        assert torch.load(file, map_location="cpu", weights_only=weights_only)["model"]["0.weight"].device == CPU
        file.seek(0)
        assert torch.load(file, map_location=CUDA, weights_only=weights_only)["step"].device == CUDA
        net.load_state_dict(loaded["model"])
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=weights_only)
    assert torch.equal(loaded["model"]["0.weight"], small_net()[0].weight)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loaders_pin_their_batches(gpu, workers):
    data = TensorDataset(torch.arange(8.0), torch.arange(8))
    loader = DataLoader(data, 4, pin_memory=True, num_workers=workers)
    for number, (images, labels) in enumerate(loader):
        assert images.is_pinned()
        assert labels[1:].is_pinned()
        on_gpu = images.to("cuda", non_blocking=True)
        assert gpu.waits == []
        assert on_gpu.tolist() == [4 * number + i for i in range(4)]
        gpu.waits.clear()
    assert not torch.ones(2).is_pinned()


def test_another_thread_has_the_gpu_too(gpu):
    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.ones(2).to("cuda").device))
    thread.start()
    thread.join()
    assert devices == [CUDA]


def test_autocast_is_that_of_cuda(gpu):
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    assert {name.partition("::")[2].partition(".")[0] for name in registered} >= LOWERED | PROMOTED
    x = torch.rand(2, 2, device="cuda")
    with torch.autocast("cuda", torch.float16):
        assert torch.is_autocast_enabled("cuda")
        assert torch.get_autocast_dtype("cuda") == torch.float16
        half = x @ x
        assert half.dtype == torch.float16
        for widened in (half.softmax(1), half.exp(), half.sum(), functional.mse_loss(half, half)):
            assert widened.dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == torch.float16
        assert torch.addcmul(half, half, x).dtype == torch.float32
        assert functional.relu(half).dtype == torch.float16
        assert (x.double() @ x.double()).dtype == torch.float64
        boxes = torch.tensor([[0.0, 0, 0, 1, 1]], device="cuda")
        assert torchvision.ops.roi_align(half[None, None], boxes, 1).dtype == torch.float16
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            functional.binary_cross_entropy(x, x)
        with torch.autocast("cuda", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert not torch.is_autocast_enabled("cuda")


def test_torch_cuda_answers_as_long_as_it_lasts():
    assert not torch.cuda.is_available()
    with pretended_gpu(count=2, bfloat16=False) as gpu:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 2
        assert not torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.is_bf16_supported()  # as CUDA says of a GPU that only emulates it
        assert torch.cuda.get_device_capability() < (8, 0)
        torch.cuda.set_device(1)
        torch.cuda.manual_seed_all(0)
        x = torch.ones(1000).cuda()
        assert x.device == torch.device("cuda", 1)
        assert x.is_cuda
        assert torch.cuda.max_memory_allocated() >= 4000
        free, total = torch.cuda.mem_get_info()
        assert free < total == torch.cuda.get_device_properties(0).total_memory
        with pytest.raises(RuntimeError, match="same device, but add found at least two, cuda:0 and cuda:1"):
            x + torch.ones(1000, device="cuda:0")
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.cuda.set_device(2)
        assert kinds(gpu) == ["copy to the GPU"]
    assert not torch.cuda.is_available()
    assert not torch.accelerator.is_available()
    with pretended_gpu():
        assert torch.cuda.is_bf16_supported(including_emulation=False)
        assert torch.cuda.current_device() == 0


RANK = """
import os, torch, torch.distributed as dist
from torch import nn
from common.processes import join_processes
from common.runtime import fastest_precision
from tests.test_pretended_gpu import small_net
rank = int(os.environ["LOCAL_RANK"])
capability = [(8, 0), (7, 5)][rank]
torch.cuda.get_device_capability = lambda device=None: capability
os.environ["LOCAL_WORLD_SIZE"] = "1"  # as on two machines
assert fastest_precision(torch.device("cuda", rank)) == ["bfloat16", "float16"][rank]
join_processes()
assert fastest_precision(torch.device("cuda", rank)) == "float16"
model = nn.parallel.DistributedDataParallel(small_net()[4:].to("cuda"), device_ids=[rank])
images = torch.arange(256.0).view(2, 128)[rank : rank + 1].to("cuda")
model(images).sum().backward()
assert dist.get_backend() == "nccl" and model.module[1].weight.device == torch.device("cuda", rank)
assert model.module[1].weight.grad[0].tolist() == (64 + torch.arange(128.0)).tolist(), "mean over both processes"
gathered = [None, None]
dist.all_gather_object(gathered, rank)
dist.barrier()
try:
    dist.all_reduce(torch.ones(2))
except RuntimeError as error:
    print(gathered, error)
dist.destroy_process_group()
"""


def test_two_processes_have_a_gpu_each_and_a_precision_and_nccl_refuses_the_cpu(tmp_path):
    path = os.pathsep.join([str(ROOT / "tests/pretended_gpu/machine"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PRETENDED_GPUS": "2", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, *launch, str(tmp_path / "rank.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    # What two processes print may meet in one line.
    assert done.stdout.count("[0, 1]") == done.stdout.count("No backend type associated with device type cpu") == 2
