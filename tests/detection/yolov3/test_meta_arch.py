"""The whole model: the same detections alone and in a batch, precision, limits, and one photograph learned by heart."""

import copy
import math

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from matplotlib.cbook import get_sample_data
from timm.layers import ConvNormAct, EvoNorm2dS0a, GroupNormAct, freeze_batch_norm_2d
from torch import nn
from torchvision.io import decode_image
from torchvision.ops import batched_nms
from torchvision.transforms.v2.functional import resize

from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.yolov3.darknet import fold_batch_norm
from detection.yolov3.darknet_weights import convolutions
from detection.yolov3.targets import Grid


@pytest.fixture(scope="module")
def tiny(build):
    """yolov3-tiny with random weights that detect something everywhere."""
    model = build("yolov3_tiny", "MODEL.YOLOV3.SCORE_THRESH_TEST", 0.005)
    for _, norm in convolutions(model):
        if norm is not None:
            norm.momentum = 1.0
    for level in model.head.levels:
        torch.nn.init.normal_(level.prediction.weight, std=0.1)
    with torch.no_grad():
        model.train().head(list(model.backbone(torch.rand(2, 3, 128, 128)).values()))
    return model.eval()


def photos(*sizes: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [{"image": torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)} for size in sizes]


def test_an_image_has_the_same_detections_alone_and_in_a_batch(tiny):
    inputs = photos((200, 300), (96, 64), (224, 320), (64, 96), (320, 64))
    with torch.no_grad():
        together = tiny(inputs)
        alone = [tiny([image])[0] for image in inputs]
    for batched, single, image in zip(together, alone, inputs, strict=True):
        ours, theirs = batched["instances"], single["instances"]
        assert ours.image_size == tuple(image["image"].shape[1:])
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
        # Rounding may swap two of almost the same score: each must have its like among the others.
        tables = [
            torch.cat(
                [1000 * found.pred_classes[:, None], 1000 * found.scores[:, None], found.pred_boxes.tensor], dim=1
            )
            for found in (ours, theirs)
        ]
        apart = torch.cdist(*tables, p=torch.inf)
        assert max(apart.amin(dim=0).max(), apart.amin(dim=1).max()) < 0.03


def test_boxes_come_in_the_size_that_was_asked_for(tiny):
    (image,) = photos((160, 160))
    with torch.no_grad():
        plain, scaled = tiny([image, {**image, "height": 480, "width": 320}])
    assert scaled["instances"].image_size == (480, 320)
    expected = plain["instances"].pred_boxes.tensor * torch.tensor([2.0, 3.0, 2.0, 3.0])
    torch.testing.assert_close(scaled["instances"].pred_boxes.tensor, expected)


def test_one_prediction_may_be_of_several_classes_and_limits_hold(tiny):
    features = [torch.zeros(1, 1, 26, 26), torch.zeros(1, 1, 13, 13)]
    grid = Grid.of(tiny.anchor_generator, features)
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randn(len(grid.anchors), 85, generator=generator) * 2
    predictions[:, 4:] -= 3
    found = tiny.inference_single_image(predictions.clone(), grid, (416, 416))

    # The same from the definition: every pair above the threshold, the best 1000, suppression, the best 100.
    scores = predictions[:, 4:5].sigmoid() * predictions[:, 5:].sigmoid()
    rows, classes = torch.nonzero(scores > 0.005, as_tuple=True)
    best = scores[rows, classes].argsort(descending=True)[:1000]
    rows, classes = rows[best], classes[best]
    places = torch.cat([predictions[:, :2].sigmoid(), predictions[:, 2:4]], dim=1)
    boxes = tiny.box2box_transform.apply_deltas(places, grid.anchors, grid.anchor_strides)[rows]
    keep = batched_nms(boxes, scores[rows, classes], classes, 0.45)[:100]
    assert len(rows) == 1000
    assert len(rows[keep].unique()) < len(keep) == len(found) == 100
    torch.testing.assert_close(found.scores, scores[rows, classes][keep])
    torch.testing.assert_close(found.pred_classes, classes[keep])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[keep])


@pytest.mark.parametrize(
    ("side", "other", "kept"),
    [
        (48, 0, 1),  # two squares 16 pixels apart share 32 of 64 columns: more than 0.45
        (39, 0, 2),  # 23 of 55: less
        (48, 1, 2),  # of two classes
    ],
)
def test_the_worse_of_two_of_one_class_is_suppressed_above_an_iou_of_45_percent(tiny, side, other, kept):
    grid = Grid.of(tiny.anchor_generator, [torch.zeros(1, 1, 26, 26), torch.zeros(1, 1, 13, 13)])
    predictions = torch.full((len(grid.anchors), 85), -20.0)
    for column, category, objectness in ((5, 0, 8.0), (6, other, 9.0)):  # neighbours in row 5, the second is better
        place = (5 * 26 + column) * 3
        width, height = (grid.anchors[place, 2:] - grid.anchors[place, :2]).tolist()
        predictions[place, :5] = torch.tensor([0, 0, math.log(side / width), math.log(side / height), objectness])
        predictions[place, 5 + category] = 9
    found = tiny.inference_single_image(predictions, grid, (416, 416))
    # The centre of the cell at column 6, row 5, of 16 pixels.
    assert found.pred_boxes.get_centers()[0].tolist() == pytest.approx([104, 88])
    assert len(found) == kept


def test_nothing_found_is_no_error(build):
    model = build("yolov3_tiny", "MODEL.YOLOV3.SCORE_THRESH_TEST", 0.99).eval()
    with torch.no_grad():
        (output,) = model(photos((64, 64)))
    assert len(output["instances"]) == 0
    assert output["instances"].pred_boxes.tensor.shape == (0, 4)


def test_predictions_and_losses_are_float32_under_autocast(build):
    model = build("yolov3_tiny")
    with torch.autocast("cpu", torch.bfloat16):
        features = list(model.backbone(torch.rand(1, 3, 64, 64)).values())
        assert {feature.dtype for feature in features} == {torch.bfloat16}
        assert {prediction.dtype for prediction in model.head(features)} == {torch.float32}
        gt = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[5.0, 5, 40, 60]])), gt_classes=torch.tensor([3]))
        losses = model([{"image": torch.rand(3, 64, 64) * 255, "instances": gt}] * 2)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_first_scores_are_low(build):
    """The biases start at the prior, so that the first loss is not that of thousands of false alarms."""
    model = build("Base-YOLOv3")
    with torch.no_grad():
        predictions = model.head([torch.zeros(1, c, s, s) for c, s in ((256, 76), (512, 38), (1024, 19))])
    for level, cells in zip(predictions, (76 * 76, 38 * 38, 19 * 19), strict=True):
        level = level.view(3, 25, -1)
        assert level[:, 4].sigmoid().sum().item() == pytest.approx(3 * 8, rel=0.1), cells
        assert level[:, 5:].sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)


def test_folded_batch_norm_gives_the_same_detections(tiny):
    inputs = photos((96, 128))
    folded = copy.deepcopy(tiny)
    fold_batch_norm(folded)
    assert not any(hasattr(module, "running_mean") for module in folded.modules())
    with torch.no_grad():
        ours, theirs = folded(inputs)[0]["instances"], tiny(inputs)[0]["instances"]
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, EvoNorm2dS0a, GroupNormAct])
def test_convolutions_of_every_norm_compute_as_before(norm):
    """regnetz_c16_evos and others of timm have no BatchNorm to fold."""
    frozen = freeze_batch_norm_2d(ConvNormAct(3, 32, 3))
    network = nn.Sequential(frozen, ConvNormAct(32, 64, 3, norm_layer=norm)).eval()
    for value in network.state_dict().values():
        if value.dim() == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        fold_batch_norm(network)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert not any(hasattr(module, "running_mean") for module in network.modules())


def test_the_full_network_learns_one_photograph_by_heart():
    """Darknet-53 in the precision that it is trained in, on a photograph of a person, a cap, a name tag and ribbons."""
    num_steps, height, width = 45, 128, 109
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "Base-YOLOv3.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    photo = decode_image(get_sample_data("grace_hopper.jpg", asfileobj=False))  # 600 x 512
    boxes = torch.tensor([[12.0, 22, 512, 600], [146, 22, 372, 178], [78, 484, 168, 518], [322, 488, 453, 527]])
    classes = torch.tensor([14, 3, 5, 7])
    image = resize(photo, [height, width])
    gt = Instances((height, width), gt_boxes=Boxes(boxes * height / 600), gt_classes=classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * (1 - step / num_steps)
    )
    losses = []
    for _ in range(num_steps):
        loss = sum(model([{"image": image, "instances": gt}]).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20

    model.eval()
    with torch.no_grad():
        found = model([{"image": image, "height": 600, "width": 512}])[0]["instances"]
    # AP is 1.0 exactly where the best detections are the objects, one each, and every mistake scores less.
    best = found[: len(boxes)]
    right = (pairwise_iou(best.pred_boxes, Boxes(boxes)) > 0.5) & (best.pred_classes[:, None] == classes)
    assert right.any(dim=0).all()
