"""Images and boxes on their way into a model: a painted rectangle must stay under its box."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from common.errors import UserError
from common.images import read_image, read_shrunk_image
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
    validation = DatasetMapper(cfg, True, augment=False)(entry)
    assert torch.equal(validation["image"], inference["image"])
    assert len(validation["instances"]) == 1
    assert "annotations" not in validation


def test_size_mismatch(tmp_path: Path) -> None:
    entry = paint(tmp_path / "image.png") | {"height": 160, "width": 120}
    with pytest.raises(UserError, match=r"image\.png: image is 160x120, its annotation says 120x160"):
        make_mapper([], [120])(entry)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"no image at all"),
        ("magic.jpg", b"\xff\xd8\xff"),
        ("magic.png", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jpg.*no such file"):
        read_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image.{suffix}"
    paint(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jpg", "RGB"),
        ("a.jpg", "L"),
        ("a.jpg", "CMYK"),
        ("a.png", "RGBA"),
        ("a.png", "P"),
        ("a.png", "LA"),
        ("a.gif", "P"),
        ("a.webp", "RGB"),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path: Path, name: str, mode: str) -> None:
    # One colour, so neither chroma subsampling nor palettes make a difference; Pillow is the judge.
    image = Image.new("RGB", (30, 20), (204, 51, 102)).convert(mode)
    image.save(tmp_path / name)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    read = read_image(tmp_path / name)
    assert read.shape == (3, 20, 30)
    assert read.dtype == torch.uint8
    assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 3


def test_sixteen_bits_and_animations(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").unique().tolist() == [40000 // 256]
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg")))
    assert np.abs(read_image(tmp_path / "turned.jpg")[0].numpy().astype(int) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_jpeg_is_shrunk_by_its_decoder(tmp_path: Path, shrink: int, orientation: int) -> None:
    """By OpenCV, whose reading of EXIF is held against torchvision's here."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)).resize((163, 101))
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    whole = read_image(tmp_path / "photo.jpg")
    image, size = read_shrunk_image(tmp_path / "photo.jpg", shrink)
    assert size == tuple(whole.shape[1:])
    assert tuple(image.shape[1:]) == tuple(-(-side // shrink) for side in size)
    expected = v2.functional.resize(whole, list(image.shape[1:]))
    assert (image.int() - expected.int()).abs().float().mean() < 8


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGB"), ("a.jpg", "CMYK"), ("a.webp", "RGB"), ("a.gif", "P")])
def test_what_no_decoder_shrinks_comes_whole(tmp_path: Path, name: str, mode: str) -> None:
    Image.new("RGB", (80, 60), (204, 51, 102)).convert(mode).save(tmp_path / name)
    image, size = read_shrunk_image(tmp_path / name, 4)
    assert size == (60, 80)
    assert torch.equal(image, read_image(tmp_path / name))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_jpeg_is_refused_when_shrunk_too(tmp_path: Path, share: float) -> None:
    path = tmp_path / "image.jpg"
    paint(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_shrunk_image(path, 4)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_shrunk_image(path, 4)


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
