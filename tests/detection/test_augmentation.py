"""Augmentations, mixtures, mosaics, sizes of batches: boxes stay on their pixels, all follows from seed and position.

Torchvision's own transforms, done to whole images one after the other, are the judge.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from common.errors import UserError
from common.stream import TrainingStream, build_train_loader, seeded
from detection.augmentation import augment, build_augmentations, mixup, mosaic
from detection.config import CONFIGS, get_cfg, merge_file
from detection.dataset_mapper import DatasetMapper
from detection.scene import Scene, map_boxes, open_scene, paint

COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
SIZES = [64, 96, 128]


def draw(label: int, height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    """A grey image with a rectangle in the label's colour."""
    image = torch.full((3, height, width), 120, dtype=torch.uint8)
    x0, y0, x1, y1 = box
    image[:, y0:y1, x0:x1] = COLOURS[label][:, None, None]
    return image


def make_scene(label: int, height: int, width: int, box: tuple[int, int, int, int]) -> Scene:
    image = draw(label, height, width, box)
    return open_scene(lambda _: image, (height, width), [box], [label])


def painted(scene: Scene) -> torch.Tensor:
    """What is in view, at its own size, (3, H, W)."""
    return torch.from_numpy(paint(scene, *scene.size)).permute(2, 0, 1)


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
        path = folder / f"{index}.png"
        Image.fromarray(draw(label, height, width, box).permute(1, 2, 0).numpy()).save(path)
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
    first = make_scene(0, 40, 60, (10, 5, 30, 25))
    second = make_scene(2, 50, 20, (2, 30, 18, 48))
    mixed = mixup(first, second, 0.7)
    assert mixed.size == (50, 60)
    assert mixed.boxes.tolist() == [[10, 5, 30, 25], [2, 30, 18, 48]]
    assert mixed.labels.tolist() == [0, 2]
    assert mixed.weights.tolist() == pytest.approx([0.7, 0.3])
    image = painted(mixed)
    for (y, x), expected in {
        (2, 2): (120, 120, 120),  # grey in both
        (10, 25): (175, 0, 0),  # the first's rectangle, right of the second image
        (10, 15): (0.7 * 250 + 0.3 * 120, 36, 36),  # over the second's grey
        (45, 10): (0, 0, 75),  # the second's rectangle, below the first image
        (45, 50): (0, 0, 0),  # in neither
    }.items():
        assert image[:, y, x].tolist() == pytest.approx(expected, abs=0.51)


def test_mosaic_boxes_follow_pixels() -> None:
    scenes = [
        make_scene(0, 80, 100, (20, 20, 70, 60)),
        make_scene(1, 100, 80, (10, 30, 60, 80)),
        make_scene(2, 60, 60, (15, 10, 50, 50)),
        make_scene(3, 90, 140, (50, 30, 110, 70)),
    ]
    kept, meetings = [], set()
    for seed in range(30):
        made = mosaic(scenes, np.random.default_rng(seed))
        assert made.size == (100, 100)
        image = painted(made)
        for label, box in zip(made.labels.tolist(), made.boxes.tolist(), strict=True):
            # An edge is blurred over a pixel or two.
            assert find_colour(image, label) == pytest.approx(box, abs=2.5)
        assert made.weights.tolist() == [1] * len(made.labels)
        assert image.float().amax(0).min() > 60  # no gap between the quarters
        kept.append(len(made.labels))
        meetings.add(tuple(map(tuple, made.boxes.round().tolist())))
    assert len(meetings) > 20
    assert min(kept) < 4  # some objects are cut away
    assert max(kept) == 4


def test_mosaic_keeps_an_object_where_its_centre_is() -> None:
    """Images of two stripes, the left one labelled: cut to a narrow quarter, it is there or it is not."""
    scene = make_scene(0, 100, 100, (0, 0, 50, 100))
    counts = set()
    for seed in range(30):
        made = mosaic([scene] * 4, np.random.default_rng(seed))
        kept = 0
        for layer in made.layers:
            (x0, y0, x1, y1), (left, top, right, bottom) = layer.place.tolist(), layer.shown.tolist()
            # The stripe's centre is a quarter of the image from its left edge, and half of it from its upper edge.
            kept += left <= x0 + (x1 - x0) / 4 < right and top <= (y0 + y1) / 2 < bottom
        assert len(made.boxes) == kept
        assert ((made.boxes >= 0) & (made.boxes <= 100)).all()
        assert (made.boxes[:, 2:] > made.boxes[:, :2]).all()
        counts.add(kept)
    assert len(counts) > 1


def test_mosaics_meet_anywhere_in_the_middle_half() -> None:
    scene, rng = make_scene(0, 100, 100, (0, 0, 50, 100)), np.random.default_rng(0)
    meetings = np.array([mosaic([scene] * 4, rng).layers[0].shown[2:] for _ in range(100)])
    # Of 100 draws of 25 to 75 in each direction: that none lies in the outer tenth is less likely than 1 in 10^4.
    assert ((meetings.min(axis=0) >= 25) & (meetings.min(axis=0) <= 30)).all()
    assert ((meetings.max(axis=0) >= 70) & (meetings.max(axis=0) <= 75)).all()
    assert abs(np.corrcoef(meetings.T)[0, 1]) < 0.4  # by chance 0.1


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


def test_as_many_are_mixed_as_asked_for_with_any_other_and_by_any_share(entries: list[dict]) -> None:
    own = [entry | {"annotations": [entry["annotations"][0] | {"category_id": i}]} for i, entry in enumerate(entries)]
    mapper = make_mapper(own, augmentations=[], square_sizes=[64], mixup_prob=0.5)
    with seeded(0):
        found = [mapper(own[0])["instances"] for _ in range(600)]
    mixed = [instances for instances in found if len(instances) == 2]
    assert len(mixed) / 600 == pytest.approx(0.5, abs=0.085)  # by chance 0.02
    assert {instances.gt_classes[1].item() for instances in mixed} == set(range(12))
    # Beta(1.5, 1.5) has a mean of 1/2 and a variance of 1.5 * 1.5 / (3 * 3 * 4) = 1/16.
    shares = [instances.gt_weights[0].item() for instances in mixed]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)  # by chance 0.014
    assert np.std(shares) == pytest.approx(0.25, abs=0.03)  # by chance 0.007


def test_as_many_become_mosaics_as_asked_for(entries: list[dict]) -> None:
    plain = make_mapper(entries, augmentations=[], square_sizes=[64])(entries[0])["image"]
    mapper = make_mapper(entries, augmentations=[], square_sizes=[64], mosaic_prob=0.5)
    with seeded(0):
        differ = [not torch.equal(mapper(entries[0])["image"], plain) for _ in range(300)]
    assert np.mean(differ) == pytest.approx(0.5, abs=0.12)  # by chance 0.03


def make_stream(entries: list[dict], mapper: DatasetMapper) -> TrainingStream:
    def sample(index: int, position: int) -> dict:
        return mapper(entries[index], position // 4)

    return TrainingStream(len(entries), sample, seed=7, batch_size=4)


def test_sizes_are_those_of_the_batch(entries: list[dict]) -> None:
    mapper = make_mapper(entries, mixup_prob=0.5, mosaic_prob=0.5)
    stream = make_stream(entries, mapper)
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
    options = {"mixup_prob": 0.7, "mosaic_prob": 0.5, "interpolations": ["nearest", "bilinear", "bicubic"]}
    stream = make_stream(entries, make_mapper(entries, **options))
    expected = [[stream[4 * batch + place] for place in range(4)] for batch in range(9)]  # three epochs
    for workers in (0, 1):
        torch.manual_seed(workers)  # what the process draws besides is of no account
        restarted = make_stream(entries, make_mapper(entries, **options))
        loader = build_train_loader(restarted, range(5, 9), workers, collate_fn=list)
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
        ([{"RandomIoUCrop": {"sampler_options": [0.5, 0.9]}}], "RandomIoUCrop .*sampler_options lack 1.0"),
        ([{"RandomIoUCrop": {"sampler_options": []}}], "RandomIoUCrop .*sampler_options lack 1.0"),
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
def test_every_augmentation_of_the_recipes_changes_something(name: str) -> None:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{name}.yaml")
    scene = make_scene(1, 60, 80, (10, 20, 60, 50))
    plain = painted(scene)
    for transform in build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.MODEL.PIXEL_MEAN):
        images = [painted(augment(transform, scene, np.random.default_rng(seed))) for seed in range(20)]
        assert sum(image.shape != plain.shape or not torch.equal(image, plain) for image in images) >= 5, transform


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    """Blurred colours of all kinds, uint8 (3, 180, 240)."""
    noise = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    image = Image.fromarray(noise).resize((240, 180), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "factors",
    [
        {"brightness": 0.7},
        {"brightness": 1.3},
        {"contrast": 0.5},
        {"contrast": 1.5},
        {"saturation": 0.5},
        {"saturation": 1.5},
        {"hue": -0.05},
        {"hue": 0.5},
        {"brightness": 1.1, "contrast": 1.4, "saturation": 1.3, "hue": 0.04},
    ],
)
def test_colours_are_those_of_torchvision(photo: torch.Tensor, factors: dict) -> None:
    """Of the twelve ways in which torchvision may do it, ours is one, and over many draws all of them."""
    photo = photo[:, ::3, ::3]
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    transform = v2.RandomPhotometricDistort(**{key: (value, value) for key, value in (neutral | factors).items()}, p=1)
    expected = {
        (before, order): transform.transform(
            photo,
            {
                **{f"{key}_factor": value for key, value in factors.items()},
                **{f"{key}_factor": None for key in neutral.keys() - factors.keys()},
                "contrast_before": before,
                "channel_permutation": torch.tensor(order),
            },
        ).int()
        for before in (True, False)
        for order in itertools.permutations(range(3))
    }
    scene = open_scene(lambda _: photo, (60, 80), [], [])
    found = set()
    for seed in range(60):
        image = painted(augment(transform, scene, np.random.default_rng(seed))).int()
        errors = {key: (image - other).abs().float() for key, other in expected.items()}
        key = min(errors, key=lambda key: errors[key].mean())
        assert errors[key].mean() < 1.5
        assert errors[key].max() <= 16  # OpenCV counts hues in 256 steps
        found.add(key)
    assert {order for _, order in found} == set(itertools.permutations(range(3)))
    if len(factors) > 1:
        assert len(found) == 12


def test_each_colour_and_the_order_of_the_channels_are_changed_in_half_of_the_images(photo: torch.Tensor) -> None:
    """One colour at a time, besides the order of the channels."""
    photo = photo[:, ::3, ::3]
    neutral = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    orders = [photo[list(order)].int() for order in itertools.permutations(range(3))]
    scene, rng, in_order = open_scene(lambda _: photo, (60, 80), [], []), np.random.default_rng(0), []
    for key in neutral:
        bounds = (0.15, 0.18) if key == "hue" else (0.3, 0.4)  # a third of a turn would be an order of the channels
        transform = v2.RandomPhotometricDistort(**(neutral | {key: bounds}))
        images = [painted(augment(transform, scene, rng)).int() for _ in range(200)]
        errors = np.array([[(image - other).abs().float().mean() for other in orders] for image in images])
        least = errors.min(axis=1)
        assert 70 <= (least > 8).sum() <= 130, key
        assert ((least < 2) | (least > 8)).all(), key
        in_order += (errors.argmin(axis=1)[least < 2] == 0).tolist()
    # Half of them keep the order, and a sixth of the others gets it by chance; of some 400 images 0.025 off by chance.
    assert np.mean(in_order) == pytest.approx(1 / 2 + 1 / 12, abs=0.1)


def reference(photo: torch.Tensor, scene: Scene, fill: int) -> torch.Tensor:
    """What a scene without effects but a zoom-out shows: everything made in full, one after the other."""
    x0, y0, x1, y1 = scene.view.astype(int).tolist()
    margin = 800
    canvas = v2.functional.pad(photo, [margin] * 4, fill=fill)
    return v2.functional.crop(canvas, margin + y0, margin + x0, y1 - y0, x1 - x0)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 60), (150, 110), (400, 300)])
def test_painting_is_zooming_cropping_resizing_and_flipping(
    photo: torch.Tensor, interpolation: str, size: tuple[int, int]
) -> None:
    transforms = build_augmentations(["RandomZoomOut", "RandomIoUCrop", "RandomHorizontalFlip"], fill=(90, 90, 90))
    scene = open_scene(lambda _: photo, (180, 240), [(60, 50, 130, 120), (150, 20, 230, 170)], [0, 1])
    for seed in range(20):
        made, rng = scene, np.random.default_rng(seed)
        for transform in transforms:
            made = augment(transform, made, rng)
        expected = v2.functional.resize(reference(photo, made, 90), list(size), interpolation).int()
        expected = expected.flip(2) if made.mirrored else expected
        found = torch.from_numpy(paint(made, *size, interpolation)).permute(2, 0, 1).int()
        # Where the image ends and the fill begins lies up to half a pixel elsewhere.
        assert (found - expected).abs().float().mean() < 4
        assert (found - expected).abs().float().quantile(0.5) <= 2
        inner = reference(torch.full_like(photo, 255), made, 0)
        inner = v2.functional.resize(inner, list(size), "nearest")
        if inner.min() == 255 and interpolation != "nearest":  # all image, no fill: only rounding is left
            assert (found - expected).abs().max() <= (1 if interpolation == "bilinear" else 20)


@pytest.mark.parametrize("fill_first", [False, True])
def test_fill_is_distorted_only_when_colours_come_after_it(photo: torch.Tensor, fill_first: bool) -> None:
    fill, darker = (200, 100, 60), v2.RandomPhotometricDistort((0.5, 0.5), (1, 1), (1, 1), (0, 0), p=1)
    zoom = v2.RandomZoomOut(fill=fill, side_range=(2, 2), p=1)
    scene, rng = open_scene(lambda _: photo, (180, 240), [], []), np.random.default_rng(4)
    for transform in (zoom, darker) if fill_first else (darker, zoom):
        scene = augment(transform, scene, rng)
    x0, y0, *_ = scene.view.astype(int).tolist()
    image = painted(scene)
    assert image.shape == (3, 360, 480)
    is_fill = torch.ones(360, 480, dtype=torch.bool)
    is_fill[-y0 : 180 - y0, -x0 : 240 - x0] = False
    (colour,) = image[:, is_fill].unique(dim=1).T.tolist()
    assert sorted(colour) == ([30, 50, 100] if fill_first else [60, 100, 200])
    assert image[:, ~is_fill].float().mean() == pytest.approx(0.5 * photo.float().mean(), abs=1)


def test_contrast_is_that_of_the_whole_image_though_a_part_is_seen() -> None:
    """As where a crop comes after: a black half, a white half, and a view of the black one alone."""
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, :, 100:] = 255
    scene = open_scene(lambda _: image, (100, 200), [], [])
    transform = v2.RandomPhotometricDistort((1, 1), (0.5, 0.5), (1, 1), (0, 0), p=1)
    scene = augment(transform, scene, np.random.default_rng(0)).cut(np.array([0, 0, 90.0, 100]), np.empty(0, bool))
    assert paint(scene, 50, 45).mean() == pytest.approx(255 / 4, abs=1)


def distance(first: list, second: list) -> float:
    """Kolmogorov and Smirnov's, between two samples."""
    points = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (first, second)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomZoomOut(),
        v2.RandomZoomOut(side_range=(1.0, 2.0), p=0.8),
        v2.RandomIoUCrop(),
        v2.RandomIoUCrop(sampler_options=[0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        v2.RandomIoUCrop(min_scale=0.5, max_scale=0.9, min_aspect_ratio=0.8, max_aspect_ratio=1.3, trials=5),
    ],
)
def test_geometry_is_distributed_as_in_torchvision(transform: v2.Transform) -> None:
    """Sizes, places, and objects kept, of 1000 draws: 0.12 apart is beyond chance (1 in 10^6)."""
    boxes = [(30, 20, 90, 110), (100, 60, 230, 170), (5, 130, 25, 150)]
    scene = open_scene(None, (180, 240), boxes, [0, 1, 2])
    pixels = tv_tensors.Image(torch.zeros(1, 180, 240, dtype=torch.uint8))
    objects = tv_tensors.BoundingBoxes(torch.tensor(boxes).float(), format="XYXY", canvas_size=(180, 240))
    rng, ours, theirs = np.random.default_rng(0), [], []
    with seeded(0):
        for _ in range(1000):
            made = augment(transform, scene, rng)
            ours.append([*made.size, *map_boxes(made, *made.size).sum(axis=0), *np.isin([0, 1, 2], made.labels)])
            image, moved = transform(pixels, objects)
            moved = moved.as_subclass(torch.Tensor)
            kept = (moved[:, 2:] > moved[:, :2]).all(dim=1)
            theirs.append([*image.shape[1:], *moved[kept].sum(dim=0).tolist(), *kept.tolist()])
    for first, second in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert distance(first, second) < 0.12


def test_flips_are_as_frequent_as_asked_for() -> None:
    scene, rng = make_scene(0, 20, 30, (0, 0, 10, 10)), np.random.default_rng(0)
    for p in (0.0, 0.3, 1.0):
        flipped = [augment(v2.RandomHorizontalFlip(p), scene, rng).mirrored for _ in range(1000)]
        assert np.mean(flipped) == pytest.approx(p, abs=0.06)
    assert map_boxes(augment(v2.RandomHorizontalFlip(1), scene, rng), 20, 30).tolist() == [[20, 0, 30, 10]]


def test_a_zoom_out_around_a_crop_does_not_bring_back_what_was_cut() -> None:
    scene = make_scene(0, 100, 100, (20, 20, 80, 80)).cut(np.array([50.0, 50, 100, 100]), np.array([True]))
    made = augment(v2.RandomZoomOut(side_range=(3, 3), p=1, fill=7), scene, np.random.default_rng(0))
    assert made.size == (150, 150)
    image = painted(made)
    (box,) = map_boxes(made, 150, 150).tolist()
    assert find_colour(image, 0) == pytest.approx(box)
    assert (box[2] - box[0], box[3] - box[1]) == (30, 30)
    assert (image == 7).all(0).sum() == 150 * 150 - 50 * 50
