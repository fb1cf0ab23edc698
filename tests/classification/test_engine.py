import math
import random

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2

from classification.engine import BatchAugmentation, Trainer, evaluate
from classification.model import parameter_groups

IMAGES = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def normalised(images: torch.Tensor) -> torch.Tensor:
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), MEAN, STD)


def test_testing_only_normalises():
    prepare = BatchAugmentation(MEAN, STD, flip=1.0, rotation=40, random_erasing=1.0)
    torch.testing.assert_close(prepare(IMAGES), normalised(IMAGES))


def test_a_certain_flip_is_torchvisions():
    flipped = BatchAugmentation(MEAN, STD, flip=1.0)(IMAGES, range(4))
    torch.testing.assert_close(flipped, v2.functional.horizontal_flip(normalised(IMAGES)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_rotation_is_torchvisions(seed):
    augment = BatchAugmentation(MEAN, STD, rotation=40)
    angle = math.degrees(math.asin(augment._transform(random.Random(seed))[3]))
    ours = augment(IMAGES[:1], [seed])
    theirs = v2.functional.rotate(normalised(IMAGES[:1]), angle, InterpolationMode.BILINEAR)
    centre = (..., slice(8, 24), slice(8, 24))  # the two blend the border with the fill differently
    torch.testing.assert_close(ours[centre], theirs[centre], atol=1e-3, rtol=1e-3)
    assert (ours[..., 0, 0] == 0).all() == (theirs[..., 0, 0] == 0).all()


def test_angles_fill_their_range_and_half_are_flipped():
    augment = BatchAugmentation(MEAN, STD, flip=0.5, rotation=20)
    matrices = [augment._transform(random.Random(seed)) for seed in range(2000)]
    angles = torch.tensor([math.degrees(math.asin(matrix[3])) for matrix in matrices])
    assert angles.abs().max() <= 20
    assert angles.max() > 19.5
    assert angles.min() < -19.5
    assert abs(angles.mean()) < 1
    assert abs(sum(matrix[0] < 0 for matrix in matrices) / 2000 - 0.5) < 0.05


@pytest.mark.parametrize("rotation", [0, 20])
def test_what_is_drawn_for_an_image_depends_on_its_seed_alone(rotation):
    augment = BatchAugmentation(MEAN, STD, flip=0.5, rotation=rotation, random_erasing=0.7)
    together = augment(IMAGES, [5, 6, 7, 8])
    for index in range(4):
        torch.testing.assert_close(augment(IMAGES[index : index + 1], [5 + index])[0], together[index])
    assert not torch.allclose(augment(IMAGES, [9, 10, 11, 12]), together)


def test_a_flip_alone_turns_the_drawn_images_and_no_other():
    images = torch.randint(0, 256, (400, 3, 6, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    flipped = BatchAugmentation(MEAN, STD, flip=0.3)(images, range(400))
    plain = normalised(images)
    is_flipped = []
    for mine, image in zip(flipped, plain, strict=True):
        is_plain = torch.allclose(mine, image, atol=1e-5)
        assert is_plain or torch.allclose(mine, torch.flip(image, [2]), atol=1e-5)
        is_flipped.append(not is_plain)
    assert abs(sum(is_flipped) / 400 - 0.3) < 0.07
    # The same ones as when they are turned as well.
    turned = BatchAugmentation(MEAN, STD, flip=0.3, rotation=1e-6)(images, range(400))
    torch.testing.assert_close(turned, flipped, atol=1e-3, rtol=1e-3)


def test_erasing_blanks_one_rectangle_of_the_chosen_images():
    height, width = 60, 80
    images = torch.full((500, 3, height, width), 255, dtype=torch.uint8)
    result = BatchAugmentation(MEAN, STD, random_erasing=0.6)(images, range(500))
    shares, corners = [], set()
    for image in result:
        erased = (image == 0).all(0)
        torch.testing.assert_close(image[:, ~erased], normalised(images[0])[:, ~erased])
        if not erased.any():
            continue
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        (top, bottom), (left, right) = ((side[0].item(), side[-1].item() + 1) for side in (rows, columns))
        assert erased[top:bottom, left:right].all()
        assert erased.sum() == (bottom - top) * (right - left)  # nothing beyond the rectangle
        assert 0.3 / 1.2 < (bottom - top) / (right - left) < 1.2 / 0.3  # sides are rounded
        shares.append(erased.float().mean().item())
        corners |= {(top == 0, left == 0), (bottom == height, right == width)}
    assert abs(len(shares) / 500 - 0.6) < 0.07
    assert min(shares) > 0.017
    assert max(shares) < 0.35
    # Drawn evenly from 2 to 33 %, but that a long rectangle of a large area does not fit.
    assert abs(sum(shares) / len(shares) - (0.02 + 1 / 3) / 2) < 0.03
    assert {(True, False), (False, True), (False, False)} <= corners


class Net(nn.Module):
    """The smallest network with a backbone and a head in timm's terms."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images).relu().mean((2, 3)))


def trainer_of(model: nn.Module, schedule: str = "constant", **settings) -> Trainer:
    optimizer = create_optimizer_v2(
        parameter_groups(model, 0.1), opt="momentum", lr=0.2, weight_decay=1e-3, momentum=0.9
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=schedule, num_epochs=2, step_on_epochs=False, updates_per_epoch=2
    )
    return Trainer(model, optimizer, scheduler, BatchAugmentation(MEAN, STD), precision="float32", **settings)


def data(length: int = 8) -> list[tuple[torch.Tensor, int, int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator), index % 6, index)
        for index in range(length)
    ]


def pairs(length: int = 8) -> list[tuple[torch.Tensor, int]]:
    return [(image, label) for image, label, _ in data(length)]


def test_two_steps_are_sgd_by_hand_with_a_tenth_for_the_backbone():
    torch.manual_seed(1)  # two images are right, and one is the least likely
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    row = trainer_of(model, label_smoothing=0.1).train(iter(DataLoader(data(), batch_size=4)), 2)
    momentum = {name: torch.zeros_like(parameter) for name, parameter in reference.named_parameters()}
    losses, right = [], 0
    for images, labels, _ in DataLoader(data(), batch_size=4):
        logits = reference(normalised(images))
        right += sum(row.index(max(row)) == label for row, label in zip(logits.tolist(), labels.tolist(), strict=True))
        smooth = torch.full((4, 6), 0.1 / 6).scatter_add_(1, labels[:, None], torch.full((4, 1), 0.9))
        loss = -(smooth * logits.log_softmax(1)).sum(1).mean()
        losses.append(loss.item())
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                momentum[name].mul_(0.9).add_(parameter.grad + 1e-3 * parameter)
                parameter -= (0.2 if name.startswith("head") else 0.02) * momentum[name]
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert row["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert row["train_top1"] == pytest.approx(100 * right / 8)


def test_a_long_gradient_is_cut_to_the_largest_norm():
    model = Net()
    trainer_of(model, clip_grad=1e-3).train(iter(DataLoader(data(), batch_size=4)), 1)
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert gradient.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_the_cosine_reaches_both_groups_at_every_iteration():
    trainer = trainer_of(Net(), schedule="cosine")
    seen = []
    for _ in range(2):
        trainer.train(
            iter(DataLoader(data(), batch_size=4)),
            2,
            lambda: seen.append([group["lr"] for group in trainer.optimizer.param_groups]),
        )
    for iteration, (head, backbone) in enumerate(seen):
        assert head == pytest.approx(0.1 * (1 + math.cos(math.pi * iteration / 4)))
        assert backbone == pytest.approx(head / 10)


def test_evaluate_is_the_plain_definition():
    torch.manual_seed(0)
    model = Net()
    figures = evaluate(model, DataLoader(pairs(11), batch_size=4), BatchAugmentation(MEAN, STD), "float32")
    logits = torch.cat([model(normalised(image[None])) for image, _, _ in data(11)])
    labels = [label for _, label, _ in data(11)]
    order = logits.argsort(dim=1, descending=True).tolist()
    assert figures["top1"] == pytest.approx(100 * sum(row[0] == y for row, y in zip(order, labels, strict=True)) / 11)
    assert figures["top5"] == pytest.approx(100 * sum(y in row[:5] for row, y in zip(order, labels, strict=True)) / 11)
    loss = sum(-row.log_softmax(0)[y].item() for row, y in zip(logits, labels, strict=True)) / 11
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)


def test_bfloat16_stays_close_to_float32():
    torch.manual_seed(0)
    model = Net()
    loader = DataLoader(pairs(), batch_size=8)
    exact = evaluate(model, loader, BatchAugmentation(MEAN, STD), "float32")
    close = evaluate(model, loader, BatchAugmentation(MEAN, STD), "bfloat16")
    assert close["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert close["loss"] != exact["loss"]


def test_a_loss_that_is_no_number_is_an_error():
    model = Net()
    nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        trainer_of(model).train(iter(DataLoader(data(), batch_size=4)), 2)
