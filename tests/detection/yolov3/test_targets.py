"""Targets on scenes small enough to be computed by hand, and the ignored predictions against the full table of IoUs."""

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform
from detection.yolov3.targets import Grid, assign_targets

SIZES = [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]]


@pytest.fixture
def grid() -> Grid:
    generator = YOLOAnchorGenerator(sizes=SIZES, strides=[8, 16, 32])
    return Grid.of(generator, [torch.zeros(1, 1, 416 // s, 416 // s) for s in (8, 16, 32)])


def scene(boxes: list[list[float]], classes: list[int]) -> Instances:
    return Instances(
        (416, 416),
        gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.long),
    )


def assign(grid: Grid, scenes: list[Instances], deltas: torch.Tensor | None = None, thresh: float = 0.7):
    deltas = torch.zeros(len(scenes), len(grid.anchors), 4) if deltas is None else deltas
    return assign_targets(deltas, grid, YOLOBox2BoxTransform(), scenes, thresh)


def test_responsible_predictions_by_hand(grid):
    # 60 x 44 at (100, 52) suits 62 x 45: level 1, anchor 1, cell x 6, y 3; level 1 starts after 52 * 52 * 3.
    # 10 x 14 at (3, 411) suits 10 x 13: level 0, anchor 0, cell x 0, y 51.
    # 400 x 400 at (208, 208) suits 373 x 326: level 2, anchor 2, cell x 6, y 6, after 26 * 26 * 3 more.
    boxes = [[70, 30, 130, 74], [-2, 404, 8, 418], [8, 8, 408, 408]]
    targets = assign(grid, [scene([], []), scene(boxes, [3, 4, 5])])
    found = dict(zip(targets.classes.tolist(), targets.predictions.tolist(), strict=True))
    assert found == {3: 8112 + (3 * 26 + 6) * 3 + 1, 4: 51 * 52 * 3, 5: 8112 + 2028 + (6 * 13 + 6) * 3 + 2}
    assert targets.images.tolist() == [1, 1, 1]


def test_centre_on_the_far_edge_goes_to_the_last_cell(grid):
    targets = assign(grid, [scene([[411, 409.5, 421, 422.5]], [0])])
    assert targets.predictions.tolist() == [(51 * 52 + 51) * 3]


def test_the_last_of_two_objects_that_claim_one_prediction_gets_it(grid):
    boxes = [[100, 100, 110, 113], [200, 200, 210, 213], [100.5, 100, 110, 113]]
    targets = assign(grid, [scene(boxes, [1, 2, 3]), scene(boxes[::-1], [3, 2, 1])])
    first, second = (targets.classes[(targets.images == image) & (targets.weights > 0)] for image in (0, 1))
    assert sorted(first.tolist()) == [2, 3]
    assert sorted(second.tolist()) == [1, 2]
    assert targets.objectness.sum(dim=1).tolist() == [2, 2]


def test_no_objects_at_all_and_boxes_without_area(grid):
    for scenes in ([scene([], [])], [scene([[50, 50, 50, 80]], [0])]):
        targets = assign(grid, scenes)
        assert not targets.weights.any()
        assert not targets.objectness.any()
        assert not targets.ignored.any()


def test_a_box_without_area_takes_nothing_from_the_one_before_it(grid):
    targets = assign(grid, [scene([[100, 100, 110, 113], [105, 106, 105, 107]], [1, 2])])
    assert targets.weights.tolist() == [1, 0]
    assert targets.objectness.nonzero().tolist() == [[0, targets.predictions[0]]]
    assert torch.isfinite(targets.boxes.log()).all()


def test_no_limit_on_the_number_of_objects(grid):
    corners = torch.cartesian_prod(torch.arange(52.0), torch.arange(52.0)) * 8
    boxes = torch.cat([corners - 1, corners + torch.tensor([9.0, 12.0])], dim=1)  # 10 x 13, one in each cell
    targets = assign(grid, [scene(boxes.tolist(), [0] * len(boxes))])
    assert sorted(targets.predictions.tolist()) == list(range(0, 8112, 3))


def random_scenes(counts: list[int]) -> tuple[list[Instances], torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    scenes = []
    for count in counts:
        corners = torch.rand(count, 2, 2, generator=generator) * 460 - 20
        boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
        boxes[::10, 2] = boxes[::10, 0]  # of no width
        scenes.append(scene(boxes.tolist(), [index % 7 for index in range(count)]))
    return scenes, generator


@pytest.mark.parametrize("counts", [[0, 0], [3], [0, 400, 1, 30]])
@pytest.mark.parametrize("thresh", [0.5, 0.7])
def test_a_gpu_finds_the_same_targets_and_is_not_waited_for(grid, gpu, counts, thresh):
    scenes, generator = random_scenes(counts)
    for instances in scenes:
        instances.gt_weights = torch.rand(len(instances), generator=generator) + 0.1
    deltas = torch.randn(len(counts), len(grid.anchors), 4, generator=generator)
    expected = assign(grid, scenes, deltas, thresh)
    on_gpu = Grid(*(value.to("cuda") for value in vars(grid).values()))
    arguments = on_gpu, [instances.to("cuda") for instances in scenes], deltas.to("cuda"), thresh
    gpu.waits.clear()
    targets = assign(*arguments)
    assert gpu.waits == []
    for name, value in vars(expected).items():
        assert torch.equal(getattr(targets, name).cpu(), value), name
    assert expected.ignored.any() == any(counts)


@pytest.mark.parametrize("thresh", [0.3, 0.5, 0.7, 0.9])
def test_ignored_are_exactly_those_with_a_high_iou(grid, thresh):
    scenes, generator = random_scenes([0, 1, 1000])
    transform = YOLOBox2BoxTransform()
    deltas = torch.randn(3, len(grid.anchors), 4, generator=generator)
    deltas[:, :, :2] *= 10  # predicted centres in the corners of their cells
    deltas[:, ::7, 2:] += 5  # beyond the largest boxes that there are
    targets = assign(grid, scenes, deltas, thresh)
    for image, instances in enumerate(scenes):
        places = torch.cat([deltas[image, :, :2].sigmoid(), deltas[image, :, 2:]], dim=1)
        boxes = Boxes(transform.apply_deltas(places, grid.anchors, grid.anchor_strides))
        expected = (pairwise_iou(boxes, instances.gt_boxes) > thresh).any(dim=1)
        assert torch.equal(targets.ignored[image], expected)
    assert targets.ignored.any()
