"""The bag of pixels against torchvision's operator, and its place in the detector."""

import pytest
import torch
from torchvision.ops import roi_align

from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.roi_align import ROIAlign

SCALE = 1 / 4

# Position in the batch, then XYXY on images of 120 x 160, which is 30 x 40 pixels of the features.
BOXES = {
    "inside": [0, 20, 30, 90, 100],
    "second image": [1, 20, 30, 90, 100],
    "whole image": [0, 0, 0, 160, 120],
    "smaller than a pixel": [0, 51.3, 60.2, 52.1, 60.9],
    "long and flat": [1, 3, 50, 158, 53],
    "tall and narrow": [1, 77, 1, 79, 119],
    "over the upper left corner": [0, -30, -25, 40, 35],
    "over the lower right corner": [1, 120, 90, 200, 150],
    "far outside": [0, 400, 400, 500, 500],
    "at the border": [1, 158, 118, 160, 120],
    "on whole pixels": [0, 16, 16, 72, 72],
}


def rois(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([200.0, 160.0]) - 20
    box = torch.cat([corners.amin(1), corners.amax(1) + 0.1], dim=1)
    return torch.cat([torch.randint(2, (count, 1), generator=generator), box], dim=1)


def features(memory_format: torch.memory_format = torch.channels_last) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 30, 40, generator=generator).to(memory_format=memory_format)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("output_size", [1, 2, 7])
@pytest.mark.parametrize("aligned", [True, False])
def test_values_are_those_of_torchvision(output_size: int, sampling_ratio: int, aligned: bool) -> None:
    boxes = torch.cat([torch.tensor(list(BOXES.values())), rois(200)])
    pooled = ROIAlign(output_size, SCALE, sampling_ratio, aligned)(features(), boxes)
    expected = roi_align(features(), boxes, output_size, SCALE, sampling_ratio, aligned)
    torch.testing.assert_close(pooled, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_those_of_torchvision(memory_format: torch.memory_format) -> None:
    boxes = torch.cat([torch.tensor(list(BOXES.values())), rois(50)])
    ours, theirs = features(memory_format).requires_grad_(), features(memory_format).requires_grad_()
    pooled = ROIAlign(7, SCALE, 0)(ours, boxes)
    weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))
    (pooled * weight).sum().backward()
    (roi_align(theirs, boxes, 7, SCALE, 0, True) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=0)


def test_a_ramp_is_sampled_at_the_centres_of_the_cells() -> None:
    ramp = torch.arange(40.0).expand(1, 1, 30, 40)  # the column's number, whose centre lies at number + 0.5
    pooled = ROIAlign(4, 1.0, 0)(ramp, torch.tensor([[0, 10.0, 5, 26, 21]]))
    torch.testing.assert_close(pooled[0, 0], torch.tensor([11.5, 15.5, 19.5, 23.5]).expand(4, 4))


def test_no_boxes() -> None:
    ours = features().requires_grad_()
    pooled = ROIAlign(7, SCALE, 0)(ours, torch.empty(0, 5))
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert not ours.grad.any()


def test_boxes_keep_their_coordinates_beside_bfloat16_features() -> None:
    ramp = torch.arange(1000.0).expand(1, 1, 8, 1000) / 1000
    boxes = torch.tensor([[0, 511.0, 2, 518, 6]])  # 511 is 512 in bfloat16
    pooled = ROIAlign(7, 1.0, 0)(ramp.bfloat16(), boxes)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, ROIAlign(7, 1.0, 0)(ramp.bfloat16().float(), boxes).bfloat16())
    rounded = ROIAlign(7, 1.0, 0)(ramp.bfloat16(), boxes.bfloat16().float())
    assert not torch.equal(pooled, rounded)


def test_the_detector_pools_with_it() -> None:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / "faster_rcnn_R_50_FPN.yaml")
    merge_file(cfg, CONFIGS / "Sample-faster_rcnn.yaml")
    cfg.MODEL.DEVICE = "cpu"
    levels = build_model(cfg).roi_heads.box_pooler.level_poolers
    assert [(type(level), level.output_size, level.spatial_scale, level.sampling_ratio) for level in levels] == [
        (ROIAlign, 7, scale, 2) for scale in (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    ]
