"""Weights in and out: what is read is tensors and plain values, and every tensor has its place."""

import copy
import os
import pickle
import re
import urllib.error
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch import nn

from common.errors import UserError
from common.weights import load_state, locate_weights, read_checkpoint, resume_optimizer, save_checkpoint, weights_of


def network(classes: int = 2) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return nn.ModuleDict({"body": body, "head": nn.Linear(4, classes)})


def test_pickles_do_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Malicious()))
    torch.save({"model": {"x": torch.zeros(1)}, "more": Malicious()}, tmp_path / "c.pth")
    (tmp_path / "d.safetensors").write_bytes(pickle.dumps(Malicious()))
    for path in sorted(tmp_path.glob("?.*")):
        with pytest.raises(UserError, match=re.escape(str(path))) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)  # no advice to run it after all
    assert not (tmp_path / "it ran").exists()
    torch.load(tmp_path / "c.pth", weights_only=False)
    assert (tmp_path / "it ran").exists()  # so it would have


def test_broken_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    save_checkpoint(whole, {"model": network().state_dict()})
    (tmp_path / "truncated.pth").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save({"model": {}}, tmp_path / "nothing.pth")
    (tmp_path / "folder.pth").mkdir()
    for path in sorted({*tmp_path.iterdir(), tmp_path / "missing.pth"} - {whole}):
        with pytest.raises(UserError, match=re.escape(str(path))) as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
        assert "expected" in str(error.value)


def test_save_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_checkpoint(path, {"model": {"x": torch.ones(3)}})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"model": {"x": lambda: None}})  # cannot be written
    assert read_checkpoint(path)["model"]["x"].tolist() == [1, 1, 1]
    assert [child.name for child in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize("wrapping", [None, "model", "state_dict", "safetensors"])
def test_weights_there_and_back(tmp_path: Path, wrapping: str | None) -> None:
    saved, loaded = network(), network()
    path = tmp_path / f"model.{'safetensors' if wrapping == 'safetensors' else 'pth'}"
    if wrapping == "safetensors":
        save_file(saved.state_dict(), path)
    else:
        torch.save({wrapping: saved.state_dict(), "iteration": 7} if wrapping else saved.state_dict(), path)
    assert load_state(loaded, weights_of(read_checkpoint(path)), path) == []
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())


def test_the_average_comes_first_and_a_wrapper_leaves_no_prefix() -> None:
    trained, average = torch.zeros(1), torch.ones(1)
    assert weights_of({"model": {"x": trained}, "average": {"x": average}}) == {"x": average}
    assert weights_of({"model": {"module.x": trained}}) == {"x": trained}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("body.1.running_mean"), r"1 tensors missing \(body\.1\.running_mean"),
        (lambda state: state.update({"tail.weight": torch.zeros(1)}), r"1 tensors unexpected \(tail\.weight"),
        (lambda state: state.update({"head.bias": torch.zeros(5)}), r"of another shape \(head\.bias \(5,\) for \(2,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_every_tensor_is_accounted_for(change, expected: str) -> None:
    state = network().state_dict()
    change(state)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"file\.pth: does not fit the model: .*{expected}") as error:
        load_state(model, state, "file.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing is half loaded"


def test_step_counters_may_be_absent() -> None:
    state = network().state_dict()
    del state["body.1.num_batches_tracked"]
    assert load_state(network(), state, "file.pth") == []


def test_a_part_and_layers_of_other_classes() -> None:
    model = network(classes=2)
    before = model["head"].weight.clone()
    state = network(classes=5).state_dict()
    head = ["head.weight", "head.bias"]
    assert load_state(model, state, "file.pth", replaceable=head) == head
    assert torch.equal(model["head"].weight, before)
    assert torch.equal(model["body"][0].weight, state["body.0.weight"])

    body = {name: value for name, value in network().state_dict().items() if name.startswith("body.")}
    with pytest.raises(UserError, match=r"2 tensors missing \(head\.bias"):
        load_state(model, body, "file.pth")
    load_state(model, body, "file.pth", prefix="body.")
    assert torch.equal(model["head"].weight, before)
    assert torch.equal(model["body"][0].weight, body["body.0.weight"])


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb", "adan", "adafactor", "kron"])
@torch.compiler.set_stance("force_eager")  # kron would compile parts of itself for half a minute
def test_an_optimizer_goes_on_as_if_it_had_not_stopped(name: str) -> None:
    """Some count their steps in a group of parameters, where settings are too."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    stopped = copy.deepcopy(model)
    whole, first = (create_optimizer_v2(each, opt=name, lr=0.01) for each in (model, stopped))
    train(model, whole, range(7))
    train(stopped, first, range(4))
    again = create_optimizer_v2(stopped, opt=name, lr=0.01)
    resume_optimizer(again, copy.deepcopy(first.state_dict()))
    train(stopped, again, range(4, 7))
    assert torch.equal(model.weight, stopped.weight) and torch.equal(model.bias, stopped.bias)


def test_an_optimizer_of_other_groups_is_refused() -> None:
    model = nn.Linear(3, 2)
    together = torch.optim.SGD(model.parameters(), lr=0.1)
    apart = torch.optim.SGD([{"params": [value]} for value in model.parameters()], lr=0.1)
    with pytest.raises(UserError, match="other groups of parameters"):
        resume_optimizer(apart, together.state_dict())


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with nothing in it, nor in `weights/`; whoever asks the hub itself is told of no such page."""

    def answer(url: str, **_: object) -> None:
        raise urllib.error.HTTPError(url, 404, "Not Found", None, None)  # type: ignore[arg-type]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", answer)
    return tmp_path / "cache"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.usefixtures("empty_hub")
def test_a_file_in_weights_is_found_by_the_name_of_its_model(suffix: str) -> None:
    path = Path(f"weights/resnet18{suffix}")
    path.parent.mkdir()
    save_file(network().state_dict(), path) if suffix == ".safetensors" else torch.save(network().state_dict(), path)
    assert locate_weights("resnet18") == {"file": str(path)}
    assert locate_weights("resnet34") is None


def test_what_the_hub_has_sent_before_is_found_in_its_cache(empty_hub: Path) -> None:
    repository = empty_hub / f"models--{timm.get_pretrained_cfg('resnet18').hf_hub_id.replace('/', '--')}"
    file = repository / "snapshots" / "abc" / "model.safetensors"
    for path, text in ((repository / "refs" / "main", "abc"), (file, "weights")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert locate_weights("resnet18") == {"file": str(file)}


@pytest.mark.usefixtures("empty_hub")
def test_a_hub_that_answers_with_an_error_is_left_to_timm() -> None:
    assert locate_weights("resnet18") is None
