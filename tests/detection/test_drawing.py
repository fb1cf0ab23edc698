"""Pictures: boxes where they belong, labels that can be read, photographs of any size and shape."""

import logging

import numpy as np
import pytest
import torch
from matplotlib import colormaps, font_manager
from torchvision.ops import box_iou

from detection.drawing import Picture, bars, beside, class_colors, color_scale, place_labels

RED = np.array([[1.0, 0, 0]])


@pytest.mark.parametrize("size", [(12, 16), (480, 640), (3000, 4000), (160, 2400), (1600, 120), (1, 1), (2, 3000)])
def test_a_picture_of_any_shape_has_a_sane_size_and_boxes_in_pixels_of_the_photograph(size):
    height, width = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, height // 2 :, width // 2 :] = 255
    picture = Picture(image)
    assert 640 <= max(picture.pixels.shape) <= 1600
    assert (picture.height, picture.width) == size
    drawn_height, drawn_width = picture.pixels.shape[:2]
    assert drawn_height / drawn_width == pytest.approx(height / width, rel=0.5 / min(drawn_height, drawn_width))
    picture.draw_boxes(np.array([[width // 2, height // 2, width, height]]), RED)
    assert image.unique().tolist() in ([0, 255], [255])  # it is left as it is
    if min(drawn_height, drawn_width) < 40:
        return  # a line covers it
    # The white quarter lies inside the box: on its edge there is the line, inside it is white, outside black.
    x, y = round(drawn_width * (width // 2) / width), round(drawn_height * (height // 2) / height)
    assert picture.pixels[(y + drawn_height) // 2, (x + drawn_width) // 2].tolist() == [255] * 3
    if min(height, width) > 1:
        assert picture.pixels[y // 2, x // 2].tolist() == [0] * 3
        assert picture.pixels[(y + drawn_height) // 2, x].tolist() == [255, 0, 0]


def test_a_box_has_edges_in_fractions_of_a_pixel():
    """What a line covers of a pixel decides how dark it is: the centre of mass of the line is the edge."""
    for edge in (300.0, 300.25, 300.5, 300.75):
        picture = Picture(torch.zeros(3, 480, 640, dtype=torch.uint8))
        picture.draw_boxes(np.array([[edge, 100, 600, 400]]), RED)
        column = picture.pixels[250, 280:320, 0].astype(float)
        assert (column * (np.arange(280, 320) + 0.5)).sum() / column.sum() == pytest.approx(edge, abs=0.1)


def random_boxes(count: int, width: int, height: int) -> np.ndarray:
    corner = np.random.default_rng(0).uniform(0, (width - 120, height - 120), (count, 2))
    return np.concatenate([corner, corner + 100], axis=1)


@pytest.mark.parametrize("count", [8, 60])
def test_labels_of_a_crowd_are_apart_and_inside_the_photograph(count):
    boxes = random_boxes(count, 640, 480)
    boxes = np.concatenate([boxes, boxes[:2] + 3, [[-20, -20, 660, 500]]])  # two almost on others, one over the edge
    places = place_labels(boxes, np.tile([100.0, 18.0], (len(boxes), 1)), (640, 480))
    assert places[:, :2].min() >= 0 and (places[:, 2:] <= [640, 480]).all()
    assert ((places[:, 2:] - places[:, :2]) == [100, 18]).all()
    iou = box_iou(torch.from_numpy(places).double(), torch.from_numpy(places).double())
    assert iou.fill_diagonal_(0).max() == 0


def test_labels_without_room_are_still_inside():
    boxes = random_boxes(40, 320, 240)
    places = place_labels(boxes, np.tile([300.0, 30.0], (40, 1)), (320, 240))
    assert places[:, :2].min() >= 0 and (places[:, 2:] <= [320, 240]).all()


def test_the_last_box_keeps_the_usual_corner_for_its_label():
    boxes = np.array([[100, 100, 300, 300], [100, 100, 300, 300]])
    worse, better = place_labels(boxes, np.array([[80.0, 18.0]] * 2), (600, 400)).tolist()
    assert better == [100, 82, 180, 100]
    assert worse != better


def test_a_label_without_a_free_corner_takes_the_free_place_nearest_to_the_usual_one():
    """Eight equal boxes have taken the corners, at 150 and 210 across and 130, 150, 230 and 250 down."""
    places = place_labels(np.array([[150, 150, 250, 250]] * 9), np.array([[40.0, 20.0]] * 9), (400, 400)).tolist()
    corners = [[x, y, x + 40, y + 20] for y in (130, 150, 230, 250) for x in (150, 210)]
    assert places[:0:-1] == corners
    assert places[0] == [150, 100, 190, 120]


def test_labels_are_written_in_the_colour_of_their_class_and_can_be_read():
    colors = class_colors(["dog", "cat"])
    assert np.abs(colors["dog"] - colors["cat"]).max() > 0.5
    picture = Picture(torch.full((3, 480, 640), 120, dtype=torch.uint8))
    picture.draw_objects(["dog", "cat"], np.array([[50, 50, 200, 200], [300, 50, 500, 200]]), colors, [0.5, 0.25])
    for name, x in (("dog", 50), ("cat", 300)):
        label = picture.pixels[50 - 18 : 48, x : x + 60].reshape(-1, 3).astype(int)
        fill = np.rint(255 * colors[name])
        assert (np.abs(label - fill).max(axis=1) <= 1).mean() > 0.4
        brightness = label @ [0.299, 0.587, 0.114]
        assert brightness.max() - brightness.min() > 100  # the letters


def test_the_best_object_is_on_top_and_each_label_is_its_own():
    names, boxes = ["i", "WWWWWWWWWWWW"], np.array([[100, 100, 300, 300]] * 2)
    colors = dict(zip(names, np.array([[1.0, 0, 0], [0, 0, 1.0]]), strict=True))
    picture = Picture(torch.zeros(3, 480, 640, dtype=torch.uint8))
    picture.draw_objects(names, boxes, colors)
    assert picture.pixels[200, 100].tolist() == [255, 0, 0]
    short, long = ((picture.pixels == 255 * colors[name]).all(axis=2) for name in names)
    assert 0 < short[83].sum() < 20  # in the label at the usual corner, above its letter
    assert long.sum(axis=1).max() > 100


@pytest.mark.parametrize("name", ["dog", "собака", "σκύλος", "كلب", "price_$1_$2", "<b>&amp;", "%s {0} \\n"])
def test_names_of_other_scripts_and_with_signs_are_written(name, caplog):
    picture = Picture(torch.zeros(3, 480, 640, dtype=torch.uint8))
    with caplog.at_level(logging.WARNING):
        picture.draw_objects([name], np.array([[100, 100, 300, 300]]), class_colors([name]))
    assert not caplog.records
    assert (picture.pixels[80:98] == 255).all(axis=2).any()


def test_fonts_that_are_gone_or_broken_are_passed_over(tmp_path, monkeypatch):
    """Matplotlib remembers those that it once found."""
    (tmp_path / "broken.ttf").write_text("no font")
    fonts = [font_manager.FontEntry(fname=str(tmp_path / name)) for name in ("broken.ttf", "gone.ttf")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    picture = Picture(torch.zeros(3, 480, 640, dtype=torch.uint8))
    name = "\U00012001 of stars"
    picture.draw_objects([name], np.array([[100, 100, 300, 300]]), class_colors([name]))
    assert (picture.pixels[80:98] == 255).all(axis=2).any()


def test_a_script_that_no_font_has_is_told_of(caplog):
    picture = Picture(torch.zeros(3, 480, 640, dtype=torch.uint8))
    name = "\U0001f9ff\U00012000"  # no font has both an amulet and cuneiform
    with caplog.at_level(logging.WARNING):
        picture.draw_objects([name], np.array([[100, 100, 300, 300]]), class_colors([name]))
    assert name[0] in caplog.text


def test_panels_stand_beside_each_other_on_white():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    panels = [np.full((60, 80, 3), color, np.uint8) for color in colors]
    sheet = beside(panels, ["one", "two", "three"], columns=2, title="all of them")
    seen = [np.argwhere((sheet == color).all(axis=2)) for color in colors]
    assert [len(places) for places in seen] == [60 * 80] * 3
    (first, second, third) = (places.min(axis=0).tolist() for places in seen)
    assert first[0] == second[0] < third[0]
    assert first[1] == third[1] < second[1]
    wide = beside(panels[:1], ["a caption that is much longer than its panel is wide, and is not cut off"])
    rows = np.argwhere((wide[:25] < 100).all(axis=2))
    assert rows[:, 1].max() - rows[:, 1].min() > 400


def test_bars_are_as_long_as_their_values():
    panel = bars({"a": 0.5, "b": 0.25}, (200, 400))
    rows = [(panel[place] != 255).any(axis=1) for place in (12, 112)]  # in a bar, above its text
    assert [row.sum() for row in rows] == [200, 100]


def test_a_long_name_beside_a_bar_is_not_cut_off():
    panel = bars({"American Three toed Woodpecker": 0.06, "Crow": 0.04}, (640, 400))
    columns = np.flatnonzero((panel < 128).all(axis=2).any(axis=0))  # with ink
    assert 360 < columns.max() < 395


def test_the_label_of_a_low_colour_scale_is_beside_its_figures():
    bare, labelled = (color_scale(100, colormaps["gray"], label) for label in ("", "objectness"))
    has_label, has_figures = (bare != labelled).any(axis=(0, 2)), (bare[:, 20:] != 255).any(axis=(0, 2))
    assert has_label.any() and not (has_label[20:] & has_figures).any()


def test_a_colour_scale_goes_from_1_to_0():
    panel = color_scale(400, lambda values: np.stack([values, values, values, values], axis=1), "objectness")
    assert panel[0, 0].tolist() == [255] * 3
    assert panel[-1, 0].tolist() == [0] * 3
    assert panel[200, 0, 0] == pytest.approx(127, abs=2)
    for rows in (slice(0, 15), slice(193, 208), slice(-15, None)):  # the figures beside both ends and the middle
        assert (panel[rows, 20:30] < 128).any()
