"""Several views of an image: found objects come back to their places, and views are what they are said to be."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn.functional import interpolate
from torchvision.ops import batched_nms

from common.errors import UserError
from detection.config import CONFIGS, get_cfg, merge_file, merge_options
from detection.modeling import build_model
from detection.proposals import record_proposals
from detection.test_time_augmentation import TTA
from tests.detection.test_every_setting import YOLOV3

ENABLED = ["TEST.AUG.ENABLED", "True"]


@pytest.fixture(scope="module", params=["faster_rcnn_R_50_FPN", "yolov3_darknet53"])
def build(request: pytest.FixtureRequest, tiny_opts: list[str]) -> Callable[..., tuple[CfgNode, nn.Module]]:
    """Builds a tiny untrained detector that finds something everywhere, always the same, with options."""
    own = YOLOV3 if request.param.startswith("yolo") else dict(zip(tiny_opts[::2], tiny_opts[1::2], strict=True))
    own = {**own, "MODEL.DEVICE": "cpu", "MODEL.PRECISION": "float32", "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}

    def build_here(*options: str) -> nn.Module:
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / f"{request.param}.yaml")
        merge_options(cfg, [str(word) for pair in own.items() for word in pair])
        merge_options(cfg, options)
        torch.manual_seed(0)
        return build_model(cfg).eval()

    return build_here


@pytest.fixture(scope="module")
def images() -> list[dict]:
    torch.manual_seed(1)
    return [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8), "height": 3 * size[0], "width": 3 * size[1]}
        for size in ((48, 64), (64, 40))
    ]


@torch.no_grad()
def detect(model: nn.Module, inputs: list[dict]) -> list[Instances]:
    return [output["instances"] for output in model(inputs)]


def assert_same(found: list[Instances], expected: list[Instances]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other) > 0
        assert torch.equal(one.pred_classes, other.pred_classes)
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-4, atol=1e-2)


def suppressed(model: nn.Module, found: list[Instances]) -> list[Instances]:
    """YOLOv3 suppresses before boxes are cut at the edges of the image; cut, more of them overlap."""
    threshold = model.test_augmentation.nms_thresh
    return [each[batched_nms(each.pred_boxes.tensor, each.scores, each.pred_classes, threshold)] for each in found]


def test_one_view_as_it_is_changes_nothing(build: Callable, images: list[dict]):
    once = build(*ENABLED, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False")
    plain = detect(build(), images)
    assert_same(detect(once, images), suppressed(once, plain))
    if hasattr(once, "proposal_generator"):
        assert_same(suppressed(once, plain), plain)


def test_a_view_of_another_size_is_the_image_in_that_size(build: Callable, images: list[dict]):
    smaller = build(*ENABLED, "TEST.AUG.MIN_SIZES", "(32,)", "TEST.AUG.FLIP", "False")
    halved = {"scale_factor": 0.5, "mode": "bilinear", "antialias": True}
    resized = [{**inputs, "image": interpolate(inputs["image"][None].float(), **halved)[0]} for inputs in images]
    assert_same(detect(smaller, images), suppressed(smaller, detect(build(), resized)))
    # The long side is cut to MAX_SIZE.
    capped = build(*ENABLED, "TEST.AUG.MIN_SIZES", "(640,)", "TEST.AUG.FLIP", "False", "TEST.AUG.MAX_SIZE", "32")
    assert_same(detect(capped, images), suppressed(capped, detect(build(), resized)))


def test_with_flips_a_mirrored_image_has_mirrored_detections(build: Callable, images: list[dict]):
    model = build(*ENABLED)
    assert model.test_augmentation.scales == (0.75, 1.0, 1.25)
    mirrored = [{**inputs, "image": inputs["image"].flip(-1)} for inputs in images]
    expected = detect(model, images)
    for inputs, instances in zip(images, expected, strict=True):
        x0, y0, x1, y1 = instances.pred_boxes.tensor.unbind(1)
        instances.pred_boxes = Boxes(torch.stack([inputs["width"] - x1, y0, inputs["width"] - x0, y1], dim=1))
    assert_same(detect(model, mirrored), expected)


def test_an_image_without_a_frame_of_its_own_has_that_of_its_pixels(build: Callable, images: list[dict]):
    model = build(*ENABLED)
    (found,) = detect(model, [{"image": images[0]["image"]}])
    assert found.image_size == (48, 64)
    assert found.pred_boxes.tensor[:, 2].max() <= 64


def test_proposals_are_those_of_one_view(build: Callable, images: list[dict]):
    model = build(*ENABLED)
    if not hasattr(model, "proposal_generator"):
        pytest.skip("YOLOv3 proposes nothing")
    with record_proposals(model) as proposals:
        detect(model, images)
    assert [each.image_size for each in proposals] == [(48, 64), (64, 40)]
    assert model.test_augmentation is not None


def bright_box(batch: list[dict]) -> list[dict[str, Instances]]:
    """A perfect detector of the one bright rectangle; the surer, the larger the view."""
    outputs = []
    for inputs in batch:
        image = inputs["image"].float().mean(0)
        rows, columns = (image > 127).nonzero(as_tuple=True)
        x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        x_scale, y_scale = inputs["width"] / image.shape[1], inputs["height"] / image.shape[0]
        box = torch.tensor([[x0 * x_scale, y0 * y_scale, x1 * x_scale, y1 * y_scale]])
        instances = Instances((inputs["height"], inputs["width"]))
        instances.pred_boxes, instances.scores = Boxes(box), torch.tensor([image.numel() / 1e6])
        instances.pred_classes = torch.tensor([0])
        outputs.append({"instances": instances})
    return outputs


def test_what_all_views_see_is_found_once_in_its_place():
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, 20:60, 40:120] = 255
    tta = TTA(scales=(0.5, 1.0, 2.0), max_size=4000, flip=True, nms_thresh=0.5, max_detections=10)
    (output,) = tta(bright_box, [{"image": image, "height": 100, "width": 200}])
    assert len(output["instances"]) == 1
    torch.testing.assert_close(output["instances"].pred_boxes.tensor, torch.tensor([[40.0, 20, 120, 60]]))
    assert output["instances"].scores.tolist() == pytest.approx([200 * 400 / 1e6])  # of the surest view


def test_of_all_that_is_found_the_best_are_returned():
    """By a detector that finds two objects far apart, the better one last."""

    def two_corners(batch: list[dict]) -> list[dict[str, Instances]]:
        boxes, classes = Boxes(torch.tensor([[0.0, 0, 9, 9], [50, 50, 60, 60]])), torch.tensor([0, 0])
        found = Instances((100, 100), pred_boxes=boxes, scores=torch.tensor([0.8, 0.9]), pred_classes=classes)
        return [{"instances": found} for _ in batch]

    tta = TTA(scales=(1.0,), max_size=400, flip=False, nms_thresh=0.5, max_detections=1)
    (output,) = tta(two_corners, [{"image": torch.zeros(3, 100, 100)}])
    assert output["instances"].pred_boxes.tensor.tolist() == [[50, 50, 60, 60]]


def test_wrong_sizes_are_told_in_one_line(build: Callable):
    with pytest.raises(UserError, match=r"TEST\.AUG: MIN_SIZES \[0\], MAX_SIZE 4000: expected positive"):
        build(*ENABLED, "TEST.AUG.MIN_SIZES", "(0,)")
