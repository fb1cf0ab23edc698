"""Mixtures, mosaics and sizes of batches: boxes stay on their pixels, and everything follows from seed and position."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from common.errors import UserError
from detection.augmentation import build_augmentations, mixup, mosaic
from detection.config import CONFIGS, get_cfg, merge_file
from detection.data_loader import TrainingStream, build_train_loader, seeded
from detection.dataset_mapper import DatasetMapper

COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
SIZES = [64, 96, 128]


def make_sample(label: int, height: int, width: int, box: tuple[int, int, int, int]) -> dict:
    """A grey image with a rectangle in the label's colour."""
    image = torch.full((3, height, width), 120, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = COLOURS[label][:, None, None]
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([box]).float(), format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([label]),
        "weights": torch.ones(1),
    }


def is_colour(image: torch.Tensor, label: int) -> torch.Tensor:
    """Mask of the pixels that are nearer to the label's colour than to grey."""
    return (image.int() - COLOURS[label].int()[:, None, None]).abs().amax(0) < 60


def find_colour(image: torch.Tensor, label: int) -> list[int]:
    """The rectangle around all pixels of the label's colour."""
    near = is_colour(image, label)
    rows, columns = near.any(1).nonzero()[:, 0], near.any(0).nonzero()[:, 0]
    return [columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1] if len(rows) else []


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Twelve images with one rectangle each, upright and not, as dataset dicts."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for index in range(12):
        height, width = (120, 90) if index % 3 == 0 else (90, 120)
        label, x0, y0 = index % 4, 5 + 3 * index, 8 + 2 * index
        box = (x0, y0, x0 + 40, y0 + 45)
        sample = make_sample(label, height, width, box)
        path = folder / f"{index}.png"
        Image.fromarray(np.asarray(sample["image"].permute(1, 2, 0))).save(path)
        annotation = {"bbox": tuple(map(float, box)), "category_id": label}
        found.append({"file_name": str(path), "height": height, "width": width, "annotations": [annotation]})
    return found


def make_mapper(entries: list[dict], **options: object) -> DatasetMapper:
    names = ["RandomPhotometricDistort", "RandomZoomOut", "RandomIoUCrop", "RandomHorizontalFlip"]
    defaults = {"augmentations": build_augmentations(names), "square_sizes": SIZES, "seed": 7}
    return DatasetMapper(
        **{
            "min_sizes": [64],
            "max_size": 128,
            "with_annotations": True,
            "dataset_dicts": entries,
            **defaults,
            **options,
        }
    )


def assert_equal(first: dict, second: dict) -> None:
    assert torch.equal(first["image"], second["image"])
    assert first["file_name"] == second["file_name"]
    for field, value in first["instances"].get_fields().items():
        other = second["instances"].get(field)
        assert torch.equal(getattr(value, "tensor", value), getattr(other, "tensor", other))


def test_mixup_by_hand() -> None:
    first = make_sample(0, 40, 60, (10, 5, 30, 25))
    second = make_sample(2, 50, 20, (2, 30, 18, 48))
    mixed = mixup(first, second, 0.7)
    assert mixed["image"].shape == (3, 50, 60)
    assert mixed["image"].dtype == torch.uint8
    assert mixed["boxes"].tolist() == [[10, 5, 30, 25], [2, 30, 18, 48]]
    assert mixed["boxes"].canvas_size == (50, 60)
    assert mixed["labels"].tolist() == [0, 2]
    assert mixed["weights"].tolist() == pytest.approx([0.7, 0.3])
    for (y, x), expected in {
        (2, 2): (120, 120, 120),  # grey in both
        (10, 25): (175, 0, 0),  # the first's rectangle, right of the second image
        (10, 15): (0.7 * 250 + 0.3 * 120, 36, 36),  # over the second's grey
        (45, 10): (0, 0, 75),  # the second's rectangle, below the first image
        (45, 50): (0, 0, 0),  # in neither
    }.items():
        assert mixed["image"][:, y, x].tolist() == pytest.approx(expected, abs=0.51)


def test_mosaic_boxes_follow_pixels() -> None:
    samples = [
        make_sample(0, 80, 100, (20, 20, 70, 60)),
        make_sample(1, 100, 80, (10, 30, 60, 80)),
        make_sample(2, 60, 60, (15, 10, 50, 50)),
        make_sample(3, 90, 140, (50, 30, 110, 70)),
    ]
    kept, meetings = [], set()
    for seed in range(30):
        with seeded(seed):
            made = mosaic(samples)
        assert made["image"].shape == (3, 100, 100)
        for label, box in zip(made["labels"].tolist(), made["boxes"].tolist(), strict=True):
            # An edge is blurred over a pixel or two.
            assert find_colour(made["image"], label) == pytest.approx(box, abs=2.5)
        assert made["weights"].tolist() == [1] * len(made["labels"])
        assert made["image"].float().amax(0).min() > 60  # no gap between the quarters
        kept.append(len(made["labels"]))
        meetings.add(tuple(map(tuple, made["boxes"].round().tolist())))
    assert len(meetings) > 20
    assert min(kept) < 4  # some objects are cut away
    assert max(kept) == 4


def test_mosaic_keeps_an_object_where_its_centre_is() -> None:
    """Images of two stripes, the left one labelled: cut to a narrow quarter, it is there or it is not."""
    sample = make_sample(0, 100, 100, (0, 0, 50, 100))
    for seed in range(30):
        with seeded(seed):
            made = mosaic([sample] * 4)
        for box in made["boxes"].tolist():
            assert box[2] > box[0]
            assert box[3] > box[1]
        assert made["boxes"].canvas_size == (100, 100)


@pytest.mark.parametrize(
    "options", [{"mixup_prob": 1.0}, {"mosaic_prob": 1.0}, {"mixup_prob": 1.0, "mosaic_prob": 1.0}]
)
def test_boxes_follow_pixels_through_the_mapper(entries: list[dict], options: dict) -> None:
    """What is weighted enough to be seen fills its box."""
    augmentations = build_augmentations(["RandomZoomOut", "RandomHorizontalFlip"])
    mapper = make_mapper(entries, augmentations=augmentations, **options)
    checked = 0
    for seed in range(60):
        with seeded(seed):
            sample = mapper(entries[seed % len(entries)], seed)
        instances = sample["instances"]
        assert instances.image_size == tuple(sample["image"].shape[1:])
        labels = instances.gt_classes.tolist()
        weights = instances.gt_weights.tolist() if options.get("mixup_prob") else [1.0] * len(labels)
        for label, box, weight in zip(labels, instances.gt_boxes.tensor.tolist(), weights, strict=True):
            x0, y0, x1, y1 = (round(corner) for corner in box)
            if weight > 0.8 and min(x1 - x0, y1 - y0) > 7:
                assert is_colour(sample["image"][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2], label).float().mean() > 0.95
                checked += 1
    assert checked >= 10


def test_sizes_are_those_of_the_batch(entries: list[dict]) -> None:
    mapper = make_mapper(entries, mixup_prob=0.5, mosaic_prob=0.5)
    stream = TrainingStream(entries, mapper, seed=7, batch_size=4)
    found = []
    for batch in range(20):
        shapes = {tuple(stream[position]["image"].shape) for position in range(4 * batch, 4 * batch + 4)}
        assert len(shapes) == 1
        ((channels, height, width),) = shapes
        assert channels == 3
        assert height == width == make_mapper(entries).square_size(batch)
        found.append(height)
    assert set(found) == set(SIZES)
    other_seed = make_mapper(entries, seed=8)
    assert [other_seed.square_size(batch) for batch in range(20)] != found


def test_images_fit_into_the_square_without_distortion(entries: list[dict]) -> None:
    mapper = make_mapper(entries, augmentations=[], square_sizes=[60], fill=(10.4, 20, 30))
    sample = mapper(entries[1])  # 120 x 90
    assert sample["image"].shape == (3, 60, 60)
    assert (sample["image"][:, 45:] == torch.tensor([10, 20, 30])[:, None, None]).all()
    x0, y0, x1, y1 = entries[1]["annotations"][0]["bbox"]
    assert sample["instances"].gt_boxes.tensor.tolist() == [[x0 / 2, y0 / 2, x1 / 2, y1 / 2]]


def test_stream_is_the_same_after_a_restart_and_in_workers(entries: list[dict]) -> None:
    def make_stream() -> TrainingStream:
        options = {"mixup_prob": 0.7, "mosaic_prob": 0.5, "interpolations": ["nearest", "bilinear", "bicubic"]}
        return TrainingStream(entries, make_mapper(entries, **options), seed=7, batch_size=4)

    stream = make_stream()
    expected = [[stream[4 * batch + place] for place in range(4)] for batch in range(9)]  # three epochs
    for workers in (0, 1):
        torch.manual_seed(workers)  # what the process draws besides is of no account
        loader = build_train_loader(make_stream(), range(5, 9), 0, 1, workers)
        for batch, found in zip(expected[5:], loader, strict=True):
            for first, second in zip(batch, found, strict=True):
                assert_equal(first, second)


def test_last_phase(entries: list[dict]) -> None:
    """From the closing batch on: one size, nothing mixed."""
    options = {"augmentations": [], "closing_batch": 3, "closing_size": 80, "mixup_prob": 1.0, "mosaic_prob": 1.0}
    mapper = make_mapper(entries, **options)
    plain = make_mapper(entries, augmentations=[], square_sizes=[80])
    assert not torch.equal(mapper(entries[0], 2)["image"], plain(entries[0])["image"])
    for batch in (3, 4, 100):
        sample = mapper(entries[0], batch)
        assert torch.equal(sample["image"], plain(entries[0])["image"])
        assert sample["instances"].gt_weights.tolist() == [1]


def test_last_phase_in_epochs() -> None:
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.INPUT.CLOSE_ITERS = 100, 30
    cfg.INPUT.SQUARE_SIZES_TRAIN, cfg.INPUT.MIN_SIZE_TEST = [32, 64], 48
    mapper = DatasetMapper(cfg, True)
    assert {mapper.square_size(batch) for batch in range(70)} == {32, 64}
    assert {mapper.square_size(batch) for batch in range(70, 100)} == {48}


def test_interpolations_differ(entries: list[dict]) -> None:
    images = [
        make_mapper(entries, augmentations=[], interpolations=[name])(entries[0])["image"]
        for name in ("nearest", "bilinear", "bicubic")
    ]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 3
    drawn = set()
    for seed in range(20):
        mapper = make_mapper(entries, augmentations=[], square_sizes=[64], interpolations=["nearest", "bilinear"])
        with seeded(seed):
            drawn.add(tuple(mapper(entries[0])["image"].flatten().tolist()))
    assert len(drawn) == 2


def test_arguments_of_augmentations() -> None:
    crop, zoom = build_augmentations([{"RandomIoUCrop": {"min_scale": 0.5}}, "RandomZoomOut"], fill=(123.7, 116.3, 0))
    assert isinstance(crop, v2.RandomIoUCrop)
    assert crop.min_scale == 0.5
    zoomed = v2.RandomZoomOut(fill=zoom.fill, p=1)(torch.zeros(3, 20, 20, dtype=torch.uint8))
    assert zoomed.amax((1, 2)).tolist() == [124, 116, 0]
    for wrong, message in (
        ([{"RandomZoomOut": {"sides": 2}}], "RandomZoomOut .*sides"),
        ([{"RandomZoomOut": {"side_range": [0.1, 2.0]}}], "side range"),
        (["RandomIoUCrop", {"CutOut": {}}], "unknown CutOut; expected some of"),
        ([{"RandomZoomOut": None}], "RandomZoomOut None"),
        ([["RandomZoomOut"]], "unknown"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build_augmentations(wrong)
        assert str(error.value).startswith("INPUT.AUGMENTATIONS: ")


def test_wrong_options(entries: list[dict]) -> None:
    for options, message in (
        ({"interpolations": ["lanczos3"]}, "INPUT.INTERPOLATIONS .*bilinear"),
        ({"mixup_prob": 1.5}, "INPUT.MIXUP_PROB 1.5"),
        ({"mosaic_prob": -1.0}, "INPUT.MOSAIC_PROB -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            make_mapper(entries, **options)
    with pytest.raises(ValueError, match="dataset_dicts"):
        make_mapper([], mixup_prob=1.0)


@pytest.mark.parametrize("name", ["yolov3_darknet53", "yolov3_darknet53_study", "yolov3_tiny"])
def test_every_augmentation_of_the_recipes_changes_something(entries: list[dict], name: str) -> None:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{name}.yaml")
    for transform in build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.MODEL.PIXEL_MEAN):
        sample = make_sample(1, 60, 80, (10, 20, 60, 50))
        changed = 0
        for seed in range(20):
            with seeded(seed):
                made = transform(sample)["image"]
            changed += made.shape != sample["image"].shape or not torch.equal(made, sample["image"])
        assert changed >= 5, transform
