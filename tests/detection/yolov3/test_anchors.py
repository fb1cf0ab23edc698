"""Anchors and box deltas against hand-computed values and as inverses of one another."""

import pytest
import torch

from detection.config import get_cfg
from detection.yolov3.anchors import (
    YOLOAnchorGenerator,
    YOLOBox2BoxTransform,
    kmeans_anchors,
    mean_best_iou,
    shape_iou,
)


def test_default_anchors_are_those_of_the_official_cfg(shared):
    text = (shared / "weights" / "yolov3-voc.cfg").read_text()
    lines = {line.split("=")[1] for line in text.splitlines() if line.startswith("anchors")}
    (line,) = lines
    expected = torch.tensor([float(number) for number in line.split(",")]).view(3, 3, 2)
    assert torch.equal(torch.tensor(get_cfg().MODEL.YOLOV3.ANCHORS).float(), expected)


def test_anchors_by_hand():
    generator = YOLOAnchorGenerator(sizes=[[(10, 20), (4, 6)], [(32, 16), (8, 8)]], strides=[8, 16])
    first, second = generator([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 1)])
    assert first.tensor.shape == (12, 4)
    assert first.tensor[0].tolist() == [-1, -6, 9, 14]  # cell (0, 0), centre (4, 4)
    assert first.tensor[1].tolist() == [2, 1, 6, 7]
    assert first.tensor[2].tolist() == [7, -6, 17, 14]  # the next cell of the row, centre (12, 4)
    assert first.tensor[6].tolist() == [-1, 2, 9, 22]  # the next row, centre (4, 12)
    assert second.tensor.tolist() == [[-8, 0, 24, 16], [4, 4, 12, 12]]


def test_deltas_by_hand():
    anchors, strides = torch.tensor([[7.0, -6, 17, 14]]), torch.tensor([8])
    boxes = torch.tensor([[4.0, -13, 24, 27]])  # centre (14, 7) in the cell from (8, 0), twice the anchor's size
    deltas = YOLOBox2BoxTransform().get_deltas(anchors, boxes, strides)
    torch.testing.assert_close(deltas, torch.tensor([[0.75, 0.875, 0.693147, 0.693147]]))


def test_deltas_round_trip():
    generator = torch.Generator().manual_seed(0)
    transform = YOLOBox2BoxTransform()
    anchor_generator = YOLOAnchorGenerator(sizes=[[(10, 13), (16, 30)]], strides=[8])
    anchors = anchor_generator([torch.zeros(1, 1, 20, 20)])[0].tensor
    strides = torch.full((len(anchors),), 8)
    deltas = torch.cat(
        [torch.rand(len(anchors), 2, generator=generator), torch.randn(len(anchors), 2, generator=generator)], dim=1
    )
    boxes = transform.apply_deltas(deltas, anchors, strides)
    torch.testing.assert_close(transform.get_deltas(anchors, boxes, strides), deltas, rtol=1e-4, atol=1e-4)


def test_huge_deltas_stay_finite():
    boxes = YOLOBox2BoxTransform().apply_deltas(
        torch.tensor([[0.5, 0.5, 1e4, 1e4]]), torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([8])
    )
    assert torch.isfinite(boxes).all()


def test_shape_iou_by_hand():
    ious = shape_iou(torch.tensor([[10.0, 10.0]]), torch.tensor([[10.0, 10.0], [5.0, 10.0], [20.0, 5.0]]))
    torch.testing.assert_close(ious, torch.tensor([[1.0, 0.5, 50 / 150]]))


def test_kmeans_finds_separate_groups():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[10.0, 12.0], [40.0, 100.0], [200.0, 60.0]])
    sizes = torch.cat([centre * (0.95 + 0.1 * torch.rand(101, 2, generator=generator)) for centre in centres])
    anchors = kmeans_anchors(sizes, 3)
    torch.testing.assert_close(anchors, centres, rtol=0.02, atol=0.0)
    assert mean_best_iou(sizes, anchors) > 0.9
    assert torch.equal(anchors, kmeans_anchors(sizes, 3))


def test_kmeans_takes_the_median_of_a_group():
    sizes = torch.tensor([[10.0, 10.0], [10.0, 10.0], [40.0, 40.0]])
    assert kmeans_anchors(sizes, 1).tolist() == [[10, 10]]  # their mean is 20


def test_kmeans_keeps_the_best_of_its_starts():
    """Of five groups of five a start seldom draws one of each, and never finds the group that it has left out."""
    groups = torch.tensor([[10.0, 10.0], [40.0, 40.0], [160.0, 160.0], [10.0, 160.0], [160.0, 10.0]])
    sizes = groups.repeat_interleave(5, dim=0)
    assert mean_best_iou(sizes, kmeans_anchors(sizes, 5)) == pytest.approx(1.0)
    assert mean_best_iou(sizes, kmeans_anchors(sizes, 5, num_starts=1)) < 0.99


def test_kmeans_with_as_many_anchors_as_objects_fits_them_all():
    sizes = torch.tensor([[8.0, 8.0], [3.0, 90.0], [50.0, 50.0], [70.0, 2.0]])
    assert mean_best_iou(sizes, kmeans_anchors(sizes, 4)) == pytest.approx(1.0)
