"""Images and boxes on their way into a model: a painted rectangle must stay under its box."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common.errors import UserError
from common.stream import seeded
from detection.config import CONFIGS, get_cfg
from detection.dataset_mapper import DatasetMapper

RED = (250, 0, 0)
AUGMENTATIONS = ["RandomHorizontalFlip", "RandomPhotometricDistort", "RandomZoomOut", "RandomIoUCrop"]


def paint(path: Path, box: tuple[int, int, int, int] = (40, 30, 90, 70), size: tuple[int, int] = (160, 120)) -> dict:
    """Writes grey noise with a red rectangle; returns its dataset dict."""
    image = np.random.default_rng(0).integers(100, 140, (size[1], size[0], 3), dtype=np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = RED
    Image.fromarray(image).save(path)
    annotation = {"bbox": tuple(map(float, box)), "category_id": 3}
    return {"file_name": str(path), "height": size[1], "width": size[0], "annotations": [annotation]}


def find_red(image: torch.Tensor) -> tuple[float, float, float, float]:
    """The rectangle around all pixels that are more red than not."""
    red = (image[0].int() - image[1:].int().amax(0)) > 100
    rows, columns = red.any(1).nonzero()[:, 0], red.any(0).nonzero()[:, 0]
    return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


def make_mapper(names: list[str], min_sizes: list[int], max_size: int = 400) -> DatasetMapper:
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATIONS, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = names, tuple(min_sizes), max_size
    return DatasetMapper(cfg, True)


@pytest.mark.parametrize(
    ("names", "min_sizes"),
    [
        ([], [120]),
        ([], [60]),
        ([], [240]),
        (["RandomHorizontalFlip"], [120]),
        (["RandomZoomOut"], [120]),
        (["RandomIoUCrop"], [120]),
        (["RandomZoomOut", "RandomIoUCrop", "RandomHorizontalFlip"], [90, 120, 150]),
    ],
)
def test_boxes_follow_pixels(tmp_path: Path, names: list[str], min_sizes: list[int]) -> None:
    entry = paint(tmp_path / "image.png")
    mapper = make_mapper(names, min_sizes)
    found = set()
    for seed in range(12):
        with seeded(seed):
            sample = mapper(entry)
        (box,) = sample["instances"].gt_boxes.tensor.tolist()
        assert sample["instances"].gt_classes.tolist() == [3]
        assert sample["instances"].image_size == tuple(sample["image"].shape[1:])
        # A resized edge is blurred over a pixel or two.
        assert find_red(sample["image"]) == pytest.approx(box, abs=2.5)
        found.add(tuple(box))
        assert (sample["height"], sample["width"]) == (120, 160)  # of the file, not of the sample
    assert (len(found) > 1) == bool(names)


def test_flip_and_resize_by_hand(tmp_path: Path) -> None:
    entry = paint(tmp_path / "image.png")
    flip = DatasetMapper(
        augmentations=[v2.RandomHorizontalFlip(p=1)], min_sizes=[60], max_size=400, with_annotations=True
    )
    sample = flip(entry)
    assert sample["image"].shape == (3, 60, 80)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[(160 - 90) / 2, 15, (160 - 40) / 2, 35]]


def test_boxes_below_a_pixel_are_dropped(tmp_path: Path) -> None:
    """Halved, two are half a pixel wide or high, and one is a whole pixel."""
    entry = paint(tmp_path / "image.png")
    boxes = [(10, 10, 11, 50), (10, 10, 50, 11), (10, 10, 12, 12)]
    entry["annotations"] = [{"bbox": box, "category_id": number} for number, box in enumerate(boxes)]
    instances = make_mapper([], [60])(entry)["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[5, 5, 6, 6]]
    assert instances.gt_classes.tolist() == [2]


def test_padding_and_what_is_zoomed_out_of_have_the_mean_colour(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.INPUT.SQUARE_SIZES_TRAIN = [10.4, 20.0, 29.6], [160]
    cfg.INPUT.AUGMENTATIONS = [{"RandomZoomOut": {"p": 1.0, "side_range": [2.0, 2.0]}}]
    image = DatasetMapper(cfg, True)(paint(tmp_path / "image.png"))["image"]
    is_fill = (image == torch.tensor([10, 20, 30])[:, None, None]).all(dim=0)
    # 160 x 120 becomes 320 x 240, which is 160 x 120 again and padded below; a quarter of it is the image.
    assert is_fill[120:].all()
    assert is_fill[:120].float().mean().item() == pytest.approx(3 / 4, abs=0.01)  # an edge may lie within a pixel


@pytest.mark.parametrize("width", range(100, 120))
def test_boxes_on_the_border_are_kept(tmp_path: Path, width: int) -> None:
    """Scaled in float32, a box as wide as its image may become wider than the resized image by a rounding."""
    entry = paint(tmp_path / "image.png", box=(20, 10, width, 90), size=(width, 90))
    for min_size in (77, 97, 133):
        sample = make_mapper([], [min_size])(entry)
        (box,) = sample["instances"].gt_boxes.tensor.tolist()
        assert box[2] == pytest.approx(sample["image"].shape[2])


def test_long_side_is_bounded(tmp_path: Path) -> None:
    entry = paint(tmp_path / "image.png", size=(300, 100))
    assert make_mapper([], [100], max_size=150)(entry)["image"].shape == (3, 50, 150)


@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (1, 1)])
def test_the_thinnest_image_keeps_a_pixel(tmp_path: Path, shape: tuple[int, int]) -> None:
    entry = paint(tmp_path / "image.png", box=(0, 0, *shape), size=shape)
    sample = make_mapper([], [100])(entry)
    assert min(sample["image"].shape[1:]) == (100 if shape == (1, 1) else 1)
    assert len(sample["instances"]) == 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_changes_something(tmp_path: Path, name: str) -> None:
    entry = paint(tmp_path / "image.png")
    plain = make_mapper([], [120])(entry)
    changed = []
    for seed in range(30):
        with seeded(seed):
            sample = make_mapper([name], [120])(entry)
        same_shape = sample["image"].shape == plain["image"].shape
        changed.append(not same_shape or not torch.equal(sample["image"], plain["image"]))
    assert sum(changed) >= 3


def test_configs_name_known_augmentations() -> None:
    for path in CONFIGS.glob("*.yaml"):
        cfg = get_cfg()
        cfg.merge_from_file(str(path))
        assert len(DatasetMapper(cfg, True, dataset_dicts=[{}]).augmentations) == len(cfg.INPUT.AUGMENTATIONS)
    with pytest.raises(UserError, match="unknown Mixup"):
        make_mapper(["RandomHorizontalFlip", "Mixup"], [120])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_without_objects(tmp_path: Path, name: str) -> None:
    entry = paint(tmp_path / "image.png") | {"annotations": []}
    sample = make_mapper([name], [120])(entry)
    assert sample["instances"].gt_boxes.tensor.shape == (0, 4)
    assert sample["instances"].gt_classes.dtype == torch.int64


def test_training_and_inference_read_their_own_keys(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (60,), 90
    cfg.INPUT.AUGMENTATIONS = ["RandomZoomOut"]
    entry = paint(tmp_path / "image.png")
    assert DatasetMapper(cfg, True)(entry)["image"].shape[1] in (59, 60)  # torchvision rounds down
    inference = DatasetMapper(cfg, False)(entry)
    assert inference["image"].shape == (3, 90, 120)
    assert "instances" not in inference
    # Validation: labelled, but as inference sees the images.
    validation = DatasetMapper(cfg, False, with_annotations=True)(entry)
    assert torch.equal(validation["image"], inference["image"])
    assert len(validation["instances"]) == 1
    assert "annotations" not in validation


@pytest.mark.parametrize(
    ("key", "value", "is_train"),
    [
        ("INPUT.MIN_SIZE_TEST", 0, False),
        ("INPUT.MAX_SIZE_TEST", -1, False),
        ("INPUT.MIN_SIZE_TRAIN", (480, 0), True),
        ("INPUT.MAX_SIZE_TRAIN", 0, True),
        ("INPUT.SQUARE_SIZES_TRAIN", [320, 0], True),
    ],
)
def test_sizes_that_leave_nothing_of_an_image_are_refused(key: str, value: object, is_train: bool) -> None:
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=f"^{re.escape(f'{key} {value}')}: expected 1 or more$"):
        DatasetMapper(cfg, is_train)


@pytest.mark.parametrize("size", [416, 608, 800])
def test_the_side_that_is_fitted_is_exact(size: int) -> None:
    """Whatever the quotient of the sides is rounded to; the other one keeps whole pixels."""
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = size, size
    of_long_side = DatasetMapper(cfg, False)
    cfg.INPUT.MAX_SIZE_TEST = 10**6
    of_short_side = DatasetMapper(cfg, False)
    for side in range(1, 2001):
        assert of_short_side.test_size(side, 3 * side) == (size, 3 * size)
        assert of_long_side.test_size(side, 2 * side) == (size // 2, size)
        assert of_short_side.test_size(side, side + 1)[1] == size * (side + 1) // side


def test_a_short_side_beyond_the_limit_of_the_long_one_is_refused() -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 608, 416
    with pytest.raises(UserError, match=r"^INPUT\.MIN_SIZE_TEST 608: more than INPUT\.MAX_SIZE_TEST 416"):
        DatasetMapper(cfg, False)


def test_size_mismatch(tmp_path: Path) -> None:
    entry = paint(tmp_path / "image.png") | {"height": 160, "width": 120}
    with pytest.raises(UserError, match=r"image\.png: image is 160x120, its annotation says 120x160"):
        make_mapper([], [120])(entry)


def test_size_mismatch_of_a_shrunk_image(tmp_path: Path) -> None:
    """One pixel too many, which a shrunk image does not show."""
    entry = paint(tmp_path / "image.jpg", size=(799, 600))
    assert make_mapper([], [60])(entry)["image"].shape == (3, 60, 79)
    with pytest.raises(UserError, match=r"image is 799x600, its annotation says 800x600"):
        make_mapper([], [60])(entry | {"width": 800})


@pytest.mark.parametrize(("orientation", "turn"), [(1, None), (6, Image.Transpose.ROTATE_90)])
def test_boxes_follow_pixels_of_a_large_photograph(
    tmp_path: Path, orientation: int, turn: Image.Transpose | None
) -> None:
    """12 megapixels, which the decoder shrinks as far as the part that is seen allows."""
    entry = paint(tmp_path / "image.jpg", box=(1100, 800, 2500, 2250), size=(4001, 2999))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(tmp_path / "image.jpg")
    (image if turn is None else image.transpose(turn)).save(tmp_path / "turned.jpg", exif=exif)
    entry["file_name"] = str(tmp_path / "turned.jpg")
    for names in ([], ["RandomZoomOut", "RandomIoUCrop", "RandomHorizontalFlip"]):
        mapper = make_mapper(names, [200, 300, 416], 600)
        for seed in range(6):
            with seeded(seed):
                sample = mapper(entry)
            (box,) = sample["instances"].gt_boxes.tensor.tolist()
            assert find_red(sample["image"]) == pytest.approx(box, abs=2)


@pytest.mark.parametrize("size", [120, 30])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_drawn_on_pixels_that_were_not_turned_are_known_by_the_size(
    tmp_path: Path, orientation: int, suffix: str, size: int
) -> None:
    box = (40, 30, 90, 70)
    entry = paint(tmp_path / "image.png", box)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    with Image.open(tmp_path / "image.png") as picture:
        picture.save(path, exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    entry["file_name"] = str(path)
    sample = make_mapper([], [size])(entry)
    scale = size / 120
    assert tuple(sample["image"].shape[1:]) == (size, size * 160 // 120)
    assert np.abs(np.array(find_red(sample["image"])) - scale * np.array(box)).max() <= 2
    assert torch.allclose(sample["instances"].gt_boxes.tensor, scale * torch.tensor([box]).float())
    # Drawn on turned pixels they are what they are everywhere else.
    turned = entry | {"height": 160, "width": 120, "annotations": []}
    assert tuple(make_mapper([], [size])(turned)["image"].shape[1:]) == (size * 160 // 120, size)
