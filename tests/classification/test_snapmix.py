"""SnapMix against a reference that goes pixel by pixel, and the maps against their definition."""

import math
import os

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional

from classification.model import build_model
from classification.recipe import Recipe
from classification.run import build_trainer
from classification.snapmix import SnapMix
from common.errors import UserError
from tests.classification.runs import assert_same, train_in
from tests.processes import together

SIZE = 96


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).train()


@pytest.fixture(scope="module")
def batch():
    return torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 0, 0])


def test_a_map_is_the_logit_of_its_class_seen_place_by_place(model, batch):
    """Where the features are pooled to one number, the logit is the mean of the map before its shift and scale."""
    images, labels = batch
    maps = SnapMix(model, 4, 5.0, 1.0, "float32").maps(images, labels)
    assert model.training
    torch.testing.assert_close(maps.sum((1, 2)), torch.ones(6))
    assert maps.min() >= 0
    model.eval()
    with torch.no_grad():
        features, logits = model.forward_features(images), model(images)
    model.train()
    weight, bias = model.get_classifier().weight, model.get_classifier().bias
    for image, label, ours in zip(range(6), labels.tolist(), maps, strict=True):
        place_by_place = sum(weight[label, c] * features[image, c] for c in range(features.shape[1]))
        torch.testing.assert_close(place_by_place.mean() + bias[label], logits[image, label])
        large = functional.interpolate(place_by_place[None, None], (SIZE, SIZE), mode="bilinear")[0, 0].detach()
        large -= large.min()
        torch.testing.assert_close(ours, large / large.sum(), atol=1e-5, rtol=1e-3)


def shares_by_own_statistics():
    """The shares of a mixed batch in a process with BatchNorm statistics of its own, as between two validations."""
    torch.manual_seed(0)
    np.random.seed(1)
    model = timm.create_model("test_resnet", num_classes=4).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean += int(os.environ["RANK"])
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return SnapMix(model, 4, 5.0, 1.0, "float32")(images, torch.tensor([0, 1]))[1]


def test_all_processes_see_with_the_statistics_that_a_checkpoint_keeps():
    first, second = together(2, shares_by_own_statistics)
    assert (first > 0).sum() == 4  # both are mixed
    assert torch.equal(first, second)


def mixes_by_chance() -> list[bool]:
    """Which of ten batches a process mixes; each draws for itself, as in training."""
    np.random.seed(int(os.environ["RANK"]))
    model = timm.create_model("test_resnet", num_classes=4).train()
    mix = SnapMix(model, 4, 5.0, 0.5, "float32")
    images, labels = torch.rand(2, 3, SIZE, SIZE), torch.tensor([0, 1])
    return [mix(images, labels)[0] is not images for _ in range(10)]


def test_a_process_that_mixes_does_not_wait_for_one_that_does_not():
    first, second = together(2, mixes_by_chance)
    assert first != second


def test_mixing_equals_a_reference_that_goes_pixel_by_pixel(batch):
    images, labels = batch
    maps = torch.rand(6, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    maps /= maps.sum((1, 2), keepdim=True)
    order = torch.tensor([3, 4, 5, 0, 2, 1])
    into, out_of = (4, 20, 6, 30), (10, 26, 2, 26)  # of one size, so that nothing is resized
    mixed, targets = SnapMix.mix(images, functional.one_hot(labels, 4).float(), maps, order, into, out_of)
    for i, j in enumerate(order.tolist()):
        covered = pasted = 0.0
        expected = images[i].clone()
        for row in range(16):
            for column in range(24):
                covered += maps[i, 4 + row, 6 + column].item()
                pasted += maps[j, 10 + row, 2 + column].item()
                expected[:, 4 + row, 6 + column] = images[j, :, 10 + row, 2 + column]
        shares = [0.0] * 4
        shares[labels[i]] += 1 - covered
        shares[labels[j]] += pasted
        torch.testing.assert_close(mixed[i], expected)
        torch.testing.assert_close(targets[i], torch.tensor(shares))


def test_the_loss_is_that_of_both_labels_weighted_by_their_shares(batch):
    """With smoothing: of a share 0.9 is left, and every class has 0.1 / 4 more."""
    recipe = Recipe(model="test_resnet", snapmix=5.0, mix_prob=1.0, label_smoothing=0.1, precision="float32")
    card = {"mean": [0.5] * 3, "std": [0.5] * 3, "class_names": list("abcd")}
    trainer = build_trainer(recipe, build_model("test_resnet", 4), 1, card)
    mix, shares, seen = trainer.mixup, [], []

    def mix_and_remember(*arguments):
        images, targets = mix(*arguments)
        shares.extend(targets.tolist())
        return images, targets

    trainer.mixup = mix_and_remember
    trainer.model.register_forward_hook(lambda *call: seen.extend(call[2].detach().double().softmax(1).tolist()))
    images, labels = batch
    row = trainer.train(iter([((255 * images).byte(), labels, torch.arange(6))]), 1)
    assert any(abs(sum(share) - 1) > 1e-3 for share in shares)  # those of two images need not add up to 1
    by_hand = [
        -sum((0.9 * part + 0.1 / 4) * math.log(p) for part, p in zip(share, probabilities, strict=True))
        for share, probabilities in zip(shares, seen, strict=True)
    ]
    assert row["train_loss"] == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_a_batch_that_is_not_drawn_is_left_as_it_is(model, batch):
    images, labels = batch
    same, targets = SnapMix(model, 4, 5.0, 0.0)(images, labels)
    assert same is images
    assert targets.argmax(1).tolist() == labels.tolist()
    assert targets.sum() == 6


def test_a_training_with_it_goes_on_where_it_was(tiny_root, tmp_path):
    settings = {"snapmix": 5.0, "mix_prob": 0.8, "epochs": 2, "schedule": "constant"}
    train_in(tmp_path / "whole", tiny_root, **settings)
    train_in(tmp_path / "parts", tiny_root, **settings | {"epochs": 1})
    train_in(tmp_path / "parts", tiny_root, **settings)
    whole, parts = (torch.load(tmp_path / name / "model_last.pth", weights_only=True) for name in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])


def test_a_network_without_maps_is_refused():
    with pytest.raises(UserError, match=r"AlexNet has no class activation maps.*leave snapmix out"):
        SnapMix(build_model("alexnet", 4), 4, 5.0, 1.0)
    transformer = timm.create_model("test_vit", num_classes=4)
    with pytest.raises(UserError, match="VisionTransformer has no class activation maps"):
        SnapMix(transformer, 4, 5.0, 1.0)(torch.rand(2, 3, 160, 160), torch.tensor([0, 1]))
