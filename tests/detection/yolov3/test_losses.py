"""Targets and losses against a reference that walks over images, cells and objects one by one in float64."""

import functools
import math

import pytest
import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform
from detection.yolov3.losses import YOLOv3Loss
from detection.yolov3.meta_arch import YOLOv3

ANCHORS = [[(8, 10), (12, 7), (14, 16)], [(20, 26), (30, 18), (28, 34)], [(44, 36), (40, 60), (80, 56)]]
STRIDES = [8, 16, 32]
HEIGHT, WIDTH, CLASSES = 64, 96, 3


def overlap(a: list[float], b: list[float]) -> float:
    both = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def cross_entropy(logit: Tensor, target: float) -> Tensor:
    probability = 1 / (1 + torch.exp(-logit))
    return -target * torch.log(probability) - (1 - target) * torch.log(1 - probability)


def place_loss(logit: Tensor, place: float) -> Tensor:
    """Cross-entropy above that of the right answer, -t log t - (1 - t) log(1 - t)."""
    entropy = -sum(share * math.log(share) for share in (place, 1 - place) if share > 0)
    return cross_entropy(logit, place) - entropy


def box_loss(kind: str, box: list[Tensor], gt: list[float]) -> Tensor:
    """1 - GIoU (Rezatofighi et al., 2019) or 1 - CIoU (Zheng et al., 2020)."""
    width = torch.clamp(torch.minimum(box[2], gt[2]) - torch.maximum(box[0], gt[0]), min=0)
    height = torch.clamp(torch.minimum(box[3], gt[3]) - torch.maximum(box[1], gt[1]), min=0)
    both = width * height
    union = (box[2] - box[0]) * (box[3] - box[1]) + (gt[2] - gt[0]) * (gt[3] - gt[1]) - both
    hull_width = torch.maximum(box[2], gt[2]) - torch.minimum(box[0], gt[0])
    hull_height = torch.maximum(box[3], gt[3]) - torch.minimum(box[1], gt[1])
    if kind == "giou":
        hull = hull_width * hull_height
        return 1 - both / union + (hull - union) / hull
    distance = (box[0] + box[2] - gt[0] - gt[2]) ** 2 / 4 + (box[1] + box[3] - gt[1] - gt[3]) ** 2 / 4
    gt_angle = math.atan((gt[2] - gt[0]) / (gt[3] - gt[1]))
    v = 4 / math.pi**2 * (gt_angle - torch.atan((box[2] - box[0]) / (box[3] - box[1]))) ** 2
    alpha = (v / (1 - both / union + v)).detach()
    return 1 - both / union + distance / (hull_width**2 + hull_height**2) + alpha * v


def reference(levels: list[Tensor], scenes: list[tuple], kind: str, gamma: float, alpha: float, smoothing: float):
    """The losses by name, from raw outputs (N, A * (5 + K), H, W) and lists of (x1, y1, x2, y2, class)."""
    names = ["xy", "wh", "box_reg", "objectness", "cls"]
    losses = {name: torch.zeros((), dtype=torch.float64) for name in names}
    num_ignored = 0
    for image, scene in enumerate(scenes):
        owners = {}
        for *gt, label in scene:
            width, height = gt[2] - gt[0], gt[3] - gt[1]
            best, best_level, best_anchor = -1.0, 0, 0
            for level, sizes in enumerate(ANCHORS):
                for anchor, size in enumerate(sizes):
                    fit = overlap([0, 0, width, height], [0, 0, *size])
                    if fit > best:
                        best, best_level, best_anchor = fit, level, anchor
            stride = STRIDES[best_level]
            column = min(int((gt[0] + gt[2]) / 2 / stride), WIDTH // stride - 1)
            row = min(int((gt[1] + gt[3]) / 2 / stride), HEIGHT // stride - 1)
            owners[best_level, best_anchor, row, column] = (gt, label)
        for level, (sizes, stride) in enumerate(zip(ANCHORS, STRIDES, strict=True)):
            output = levels[level][image].view(len(sizes), 5 + CLASSES, HEIGHT // stride, WIDTH // stride).double()
            for anchor, (anchor_width, anchor_height) in enumerate(sizes):
                for row in range(HEIGHT // stride):
                    for column in range(WIDTH // stride):
                        raw = output[anchor, :, row, column]
                        x, y = (column + raw[0].sigmoid()) * stride, (row + raw[1].sigmoid()) * stride
                        w, h = anchor_width * raw[2].exp(), anchor_height * raw[3].exp()
                        box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                        corners = [corner.item() for corner in box]
                        owner = owners.get((level, anchor, row, column))
                        is_object = owner is not None
                        ignored = any(overlap(corners, gt[:4]) > 0.7 for gt in scene)
                        num_ignored += ignored
                        if is_object or not ignored:
                            probability = raw[4].sigmoid()
                            focus = ((1 - probability) if is_object else probability) ** gamma
                            balance = 1.0 if alpha < 0 else alpha if is_object else 1 - alpha
                            losses["objectness"] += balance * focus * cross_entropy(raw[4], float(is_object))
                        if not is_object:
                            continue
                        gt, label = owner
                        width, height = gt[2] - gt[0], gt[3] - gt[1]
                        weight = 2 - width * height / (WIDTH * HEIGHT)
                        if kind == "l1":
                            place_x = min(max((gt[0] + gt[2]) / 2 / stride - column, 0.0), 1.0)
                            place_y = min(max((gt[1] + gt[3]) / 2 / stride - row, 0.0), 1.0)
                            losses["xy"] += weight * (place_loss(raw[0], place_x) + place_loss(raw[1], place_y))
                            losses["wh"] += weight * (raw[2] - math.log(width / anchor_width)).abs()
                            losses["wh"] += weight * (raw[3] - math.log(height / anchor_height)).abs()
                        else:
                            gt_box = torch.tensor(gt, dtype=torch.float64)
                            losses["box_reg"] += weight * box_loss(kind, box, gt_box)
                        for index in range(CLASSES):
                            target = float(index == label) * (1 - smoothing) + smoothing / CLASSES
                            losses["cls"] += cross_entropy(raw[5 + index], target)
    return {name: loss / len(scenes) for name, loss in losses.items()}, num_ignored


def random_scene(num_objects: int, generator: torch.Generator) -> list[tuple]:
    """Objects of about the anchors' sizes anywhere in the image, their edges cut at its border."""
    scene = []
    sizes = torch.tensor(ANCHORS, dtype=torch.float64).view(-1, 2)
    for _ in range(num_objects):
        size = sizes[torch.randint(9, (), generator=generator)] * (0.8 + 0.4 * torch.rand(2, generator=generator))
        centre = torch.rand(2, generator=generator) * torch.tensor([WIDTH, HEIGHT])
        low = (centre - size / 2).clamp(min=0).float().tolist()
        high = torch.minimum(centre + size / 2, torch.tensor([WIDTH, HEIGHT])).float().tolist()
        scene.append((*low, *high, int(torch.randint(CLASSES, (), generator=generator))))
    return scene


SCENES = {
    "random": [20, 5, 30],
    "some empty": [0, 40, 0],
    "all empty": [0, 0],
    "crowded": [120, 1],
}
FAR_EDGE = [[(WIDTH - 1.0, HEIGHT - 2.0, WIDTH + 1.0, HEIGHT + 2.0, 1), (80.0, 40.0, 112.0, 88.0, 0)]]
PLAIN = ("l1", 0.0, -1.0, 0.0)


def model_with(kind: str, gamma: float, alpha: float, smoothing: float) -> YOLOv3:
    """YOLOv3 without a network: its predictions are handed to it."""
    transform = YOLOBox2BoxTransform()
    return YOLOv3(
        backbone=nn.Identity(),
        head=nn.Identity(),
        head_in_features=["dark3", "dark4", "dark5"],
        anchor_generator=YOLOAnchorGenerator(sizes=ANCHORS, strides=STRIDES),
        box2box_transform=transform,
        loss=YOLOv3Loss(
            transform=transform,
            box_reg_loss_type=kind,
            focal_loss_gamma=gamma,
            focal_loss_alpha=alpha,
            label_smoothing=smoothing,
        ),
        num_classes=CLASSES,
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[255.0, 255.0, 255.0],
    )


def instances(scene: list[tuple]) -> Instances:
    boxes = torch.tensor([object_[:4] for object_ in scene]).view(-1, 4)
    classes = torch.tensor([object_[4] for object_ in scene], dtype=torch.long)
    return Instances((HEIGHT, WIDTH), gt_boxes=Boxes(boxes), gt_classes=classes)


@functools.cache  # for both devices, and before there is a pretended one, which makes its many small steps slow
def of_the_reference(name: str, options: tuple) -> tuple[list[Tensor], list[list[tuple]], dict, tuple, int]:
    """Raw outputs and scenes, with the losses, their gradients and the number of ignored boxes of the reference."""
    generator = torch.Generator().manual_seed(len(name))
    scenes = FAR_EDGE if name == "far edge" else [random_scene(count, generator) for count in SCENES[name]]
    levels = [
        (
            0.3 * torch.randn(len(scenes), 3 * (5 + CLASSES), HEIGHT // s, WIDTH // s, generator=generator)
        ).requires_grad_()
        for s in STRIDES
    ]
    losses, num_ignored = reference(levels, scenes, *options)
    gradients = torch.autograd.grad(sum(losses.values()), levels)
    return [level.detach() for level in levels], scenes, losses, gradients, num_ignored


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("scenes", "options"),
    [
        *((name, PLAIN) for name in [*SCENES, "far edge"]),
        ("random", ("giou", 0.0, -1.0, 0.0)),
        ("crowded", ("ciou", 0.0, -1.0, 0.0)),
        ("all empty", ("ciou", 0.0, -1.0, 0.0)),
        ("crowded", ("l1", 1.5, 0.25, 0.0)),
        ("random", ("l1", 0.0, -1.0, 0.1)),
    ],
)
def test_losses_and_gradients_equal_the_reference(scenes, options, device, request):
    levels, scenes, expected, gradients, num_ignored = of_the_reference(scenes, options)
    if device == "cuda":
        request.getfixturevalue("gpu")
    levels = [level.clone().requires_grad_() for level in levels]
    images = ImageList(torch.zeros(len(scenes), 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)] * len(scenes))
    model = model_with(*options).to(device)
    on_device = [level.to(device) for level in levels]
    losses = model.forward_training(images, on_device, on_device, [instances(scene).to(device) for scene in scenes])
    losses = {name: loss.cpu() for name, loss in losses.items()}

    assert set(losses) == {"loss_objectness", "loss_cls"} | (
        {"loss_xy", "loss_wh"} if options[0] == "l1" else {"loss_box_reg"}
    )
    assert num_ignored > 0 or not any(len(scene) > 2 for scene in scenes)  # else nothing would be tested
    for name, loss in losses.items():
        torch.testing.assert_close(loss.double(), expected[name.removeprefix("loss_")], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(sum(losses.values()), levels), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def train_on(model: YOLOv3, scenes: list[list[tuple]], generator: torch.Generator) -> dict[str, float]:
    """The losses of random predictions."""
    sizes = [(HEIGHT // stride, WIDTH // stride) for stride in STRIDES]
    levels = [torch.randn(len(scenes), 3 * (5 + CLASSES), *size, generator=generator) for size in sizes]
    images = ImageList(torch.zeros(len(scenes), 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)] * len(scenes))
    losses = model.forward_training(images, levels, levels, [instances(scene) for scene in scenes])
    return {name: loss.item() for name, loss in losses.items()}


def test_losses_do_not_depend_on_the_number_of_threads_or_on_the_run():
    """Of 90 images, whose 34,020 predictions are enough for torch to share them out; its sums are rounded otherwise."""
    generator = torch.Generator().manual_seed(7)
    scenes = [random_scene(200, generator), *([random_scene(20, generator)] * 89)]
    found, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs = [train_on(model_with(*PLAIN), scenes, generator.manual_seed(0)) for _ in range(2)]
            assert runs[0] == runs[1], threads
            found[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    assert found[2] == pytest.approx(found[1], rel=1e-6)
    assert found[4] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["l1", "giou"])
def test_the_weight_of_the_box_losses_is_theirs_alone(kind):
    scene, weighted = random_scene(5, torch.Generator().manual_seed(0)), model_with(kind, *PLAIN[1:])
    weighted.loss.box_reg_loss_weight = 3.0
    plain, found = (
        train_on(model, [scene], torch.Generator().manual_seed(1)) for model in (model_with(kind, *PLAIN[1:]), weighted)
    )
    factors = {name: 1 if name in ("loss_objectness", "loss_cls") else 3 for name in plain}
    assert {name: found[name] / plain[name] for name in plain} == pytest.approx(factors, rel=1e-5)


def test_unknown_box_loss_is_refused():
    with pytest.raises(ValueError, match="expected l1, giou or ciou"):
        YOLOv3Loss(transform=YOLOBox2BoxTransform(), box_reg_loss_type="smooth_l1")
