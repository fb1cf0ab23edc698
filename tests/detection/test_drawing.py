"""Pictures: labels that can be read, photographs of any size and shape."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from detection.drawing import class_colors, draw_boxes, side_by_side


@pytest.mark.parametrize("size", [(12, 16), (480, 640), (3000, 4000), (160, 2400), (1600, 120)])
def test_a_picture_of_any_shape_has_a_sane_size_and_boxes_in_pixels_of_the_photograph(size):
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, height // 2 :, width // 2 :] = 255
    figure, panels = side_by_side(image, 2)
    assert all(1.5 <= side <= 13.1 for side in figure.get_size_inches())
    for axes in panels:
        draw_boxes(axes, image, np.array([[width / 2, height / 2, width, height]]), class_colors(1))
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, width), (height, 0))
    FigureCanvasAgg(figure).draw()
    # The white quarter lies inside the box: just inside its edge it is white, just outside black.
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3]
    x, y = panels[0].transData.transform((width * 0.9, height * 0.9)).astype(int)
    assert pixels[y, x].tolist() == [255] * 3
    x, y = panels[0].transData.transform((width * 0.25, height * 0.25)).astype(int)
    assert pixels[y, x].tolist() == [0] * 3


def test_labels_of_a_crowd_are_apart_and_inside_the_photograph():
    image = torch.zeros(3, 400, 600, dtype=torch.uint8)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, (350, 250), (8, 2))
    boxes = np.concatenate([corner, corner + 120], axis=1)
    boxes = np.concatenate([boxes, boxes[:2] + 3, [[-20, -20, 620, 420]]])  # two almost on others, one over the edge
    figure, (axes,) = side_by_side(image, 1)
    draw_boxes(axes, image, boxes, class_colors(len(boxes)), [f"motorbike 0.{n}0" for n in range(len(boxes))])
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    extents = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(extents) == len(boxes)
    for index, extent in enumerate(extents):
        assert not any(extent.overlaps(other) for other in extents[:index])
        x, y = axes.transData.inverted().transform(extent.get_points()).T
        assert x.min() >= -1 and x.max() <= 601
        assert y.min() >= -1 and y.max() <= 401


def test_the_last_box_keeps_the_usual_corner_for_its_label():
    image = torch.zeros(3, 400, 600, dtype=torch.uint8)
    (axes,) = side_by_side(image, 1)[1]
    boxes = np.array([[100, 100, 300, 300], [100, 100, 300, 300]])
    draw_boxes(axes, image, boxes, class_colors(2), ["worse", "better"])
    position = {text.get_text(): text.get_position() for text in axes.texts}
    assert position["better"] == (100, 100)
    assert position["worse"] != (100, 100)
