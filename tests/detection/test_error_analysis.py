"""Kinds of errors: hand-made scenes, a slow plain reference written from the definitions, and what mending restores."""

import numpy as np
import pytest

from detection.error_analysis import KINDS, analyse_errors, mend, plot_errors, sort_errors
from detection.evaluation import evaluate_voc
from detection.matching import Detections

CLASSES = ["cat", "dog", "cow"]
CAT, DOG, COW = range(3)


def truth(*images: list[tuple]) -> list[dict]:
    """Dataset dicts of (class, box) or (class, box, difficult)."""
    return [
        {"annotations": [{"category_id": c, "bbox": list(box), "difficult": int(any(d))} for c, box, *d in objects]}
        for objects in images
    ]


def detections(*rows: tuple) -> Detections:
    """Of (image, class, score, box)."""
    image, category, score, box = zip(*rows, strict=True) if rows else ([], [], [], [])
    return Detections(
        np.array(image, dtype=int),
        np.array(category, dtype=int),
        np.array(score, dtype=float),
        np.array(box).reshape(-1, 4),
    )


# IoU with the first object, a cat of 100 x 100 pixels: 1, 0.8, 0.3, 0.09.
OBJECT, CLOSE, NEAR, FAR = (0, 0, 100, 100), (0, 0, 80, 100), (0, 0, 30, 100), (0, 0, 9, 100)
ELSEWHERE = (500, 500, 600, 600)


@pytest.mark.parametrize(
    ("category", "box", "kind"),
    [
        (CAT, OBJECT, "correct"),
        (CAT, CLOSE, "correct"),
        (CAT, NEAR, "localisation"),
        (CAT, FAR, "background"),
        (DOG, CLOSE, "class"),
        (DOG, NEAR, "both"),
        (DOG, FAR, "background"),
        (CAT, ELSEWHERE, "background"),
        (CAT, (0, 0, 50, 100), "localisation"),  # an IoU of exactly 0.5 has not found the object
        (DOG, (0, 0, 50, 100), "both"),
        (CAT, (0, 0, 10, 100), "localisation"),  # one of exactly 0.1 is near
    ],
)
def test_one_detection_of_one_object(category, box, kind):
    found = sort_errors(truth([(CAT, OBJECT)]), detections((0, category, 0.9, box)))
    assert found.kind.tolist() == [kind]
    assert found.is_missed.tolist() == [kind in ("both", "background")]


def test_the_second_on_an_object_is_a_duplicate_whatever_the_order_given():
    found = sort_errors(
        truth([], [(CAT, OBJECT)]), detections((1, CAT, 0.5, OBJECT), (1, CAT, 0.9, CLOSE), (0, CAT, 0.99, OBJECT))
    )
    assert found.kind.tolist() == ["duplicate", "correct", "background"]


def test_difficult_objects_are_never_missed_and_take_detections_out_of_the_count():
    ground_truth = truth([(CAT, OBJECT, True)], [(CAT, OBJECT)])
    dets = detections((0, CAT, 0.9, CLOSE), (0, CAT, 0.8, NEAR), (0, DOG, 0.7, CLOSE), (1, CAT, 0.6, OBJECT))
    found = sort_errors(ground_truth, dets)
    assert found.kind.tolist() == ["ignored", "localisation", "class", "correct"]
    assert not found.is_missed.any()
    mended_truth, mended = mend(ground_truth, dets, found, ["localisation", "class"])
    assert mended_truth == ground_truth
    assert mended.score.tolist() == [0.6]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_with_one_error_costs_what_it_takes_from_a_perfect_detector(kind):
    """A cat is found at 0.5; the error comes before it, so that precision there is a half, or takes another object."""
    wrong = {
        "class": ([(DOG, ELSEWHERE)], [(CAT, ELSEWHERE)]),
        "localisation": ([(CAT, ELSEWHERE)], [(CAT, (500, 500, 530, 600))]),
        "both": ([(DOG, ELSEWHERE)], [(DOG, ELSEWHERE), (CAT, (500, 500, 530, 600))]),
        "duplicate": ([(CAT, ELSEWHERE)], [(CAT, ELSEWHERE), (CAT, (500, 500, 590, 600))]),
        "background": ([], [(CAT, ELSEWHERE)]),
        "missed": ([(CAT, ELSEWHERE)], []),
    }
    objects, found = wrong[kind]
    ground_truth = truth([(CAT, OBJECT), *objects])
    rows = [(0, category, 0.9 - 0.1 * rank, box) for rank, (category, box) in enumerate(found)]
    analysis = analyse_errors(ground_truth, detections(*rows, (0, CAT, 0.5, OBJECT)), CLASSES)
    # Mean over the classes that have objects, of the areas by hand.
    ap50 = {
        "class": (1 / 2 + 0) / 2,  # cat: one false before the found one; dog: not found
        "localisation": 1 / 2 * 1 / 2,  # half of the recall, at a precision of one half
        "both": (1 / 2 + 1) / 2,
        "duplicate": 1 / 2 * 1 + 1 / 2 * 2 / 3,
        "background": 1 / 2,
        "missed": 1 / 2,
    }[kind]
    assert analysis.ap50 == pytest.approx(ap50)
    assert analysis.count == {name: int(name == kind) for name in KINDS}
    assert analysis.cost == pytest.approx({name: (1 - ap50) * (name == kind) for name in KINDS})


def test_only_the_best_of_several_that_could_be_the_object_is_moved_to_it():
    ground_truth = truth([(CAT, OBJECT)])
    dets = detections((0, CAT, 0.4, NEAR), (0, CAT, 0.6, NEAR), (0, DOG, 0.9, CLOSE))
    found = sort_errors(ground_truth, dets)
    _, mended = mend(ground_truth, dets, found, ["localisation"])
    assert sorted(zip(mended.score, mended.category, strict=True)) == [(0.6, CAT), (0.9, DOG)]
    assert mended.box[mended.score == 0.6].tolist() == [list(OBJECT)]
    # With both kinds mended the dog becomes the cat, and the others its duplicates, which are removed.
    _, mended = mend(ground_truth, dets, found, ["localisation", "class"])
    assert (mended.score.tolist(), mended.category.tolist()) == ([0.9], [CAT])


def test_a_class_that_no_detection_finds_counts_as_perfect_once_nothing_is_asked_of_it():
    ground_truth = truth([(CAT, OBJECT), (DOG, ELSEWHERE)])
    quiet = analyse_errors(ground_truth, detections((0, CAT, 0.9, OBJECT)), CLASSES)
    assert (quiet.ap50, quiet.cost["missed"]) == (0.5, 0.5)
    # Where it is detected in empty places, those alone still leave it nothing.
    noisy = analyse_errors(ground_truth, detections((0, CAT, 0.9, OBJECT), (0, DOG, 0.9, (200, 0, 300, 100))), CLASSES)
    assert (noisy.ap50, noisy.cost["missed"], noisy.count["background"]) == (0.5, 0, 1)


def test_nothing_to_find_and_nothing_found():
    empty = analyse_errors(truth([], []), detections(), CLASSES)
    assert np.isnan(empty.ap50)
    assert set(empty.count.values()) == {0}
    blind = analyse_errors(truth([(CAT, OBJECT)], []), detections(), CLASSES)
    assert (blind.ap50, blind.count["missed"], blind.cost["missed"]) == (0, 1, 1)


def random_scene(seed: int, images: int = 40) -> tuple[list[dict], Detections]:
    """Objects on a coarse grid of places, so that overlaps of all sizes and equal boxes come; scores with ties."""
    rng = np.random.default_rng(seed)
    ground_truth, rows = [], []
    for image in range(images):
        objects = []
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = (*rng.integers(0, 8, 2) * 10, *rng.integers(1, 5, 2) * 10)
            objects.append((int(rng.integers(3)), (x, y, x + w, y + h), rng.random() < 0.2))
        ground_truth.append(objects)
        for category, box, _ in objects:
            for _ in range(rng.integers(0, 4)):
                x0, y0, x1, y1 = np.array(box) + rng.normal(0, rng.choice([0, 2, 8]), 4)
                other = category if rng.random() < 0.7 else int(rng.integers(3))
                rows.append((image, other, rng.integers(20) / 20, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))))
        rows += [(image, int(rng.integers(3)), rng.integers(20) / 20, (60, 60, 90, 90)) for _ in range(rng.integers(2))]
    return truth(*ground_truth), detections(*[rows[i] for i in rng.permutation(len(rows))])


def slow_iou(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def slow_kinds(ground_truth: list[dict], dets: Detections) -> tuple[list[str], list[bool]]:
    """The definitions, one detection after another."""
    kinds = [""] * len(dets.score)
    claimed, reachable = set(), set()
    for row in sorted(range(len(kinds)), key=lambda r: (-dets.score[r], r)):
        image, category, box = dets.image[row], dets.category[row], dets.box[row]
        own, other = (0.0, None), (0.0, None)
        for number, annotation in enumerate(ground_truth[image]["annotations"]):
            iou = slow_iou(box, annotation["bbox"])
            if annotation["category_id"] == category and iou > own[0]:
                own = (iou, number)
            elif annotation["category_id"] != category and iou > other[0]:
                other = (iou, number)
        target = (image, own[1])
        if own[0] > 0.5:
            if ground_truth[image]["annotations"][own[1]]["difficult"]:
                kinds[row] = "ignored"
            elif target not in claimed:
                kinds[row] = "correct"
                claimed.add(target)
            elif other[0] > 0.5:
                kinds[row] = "class"
            else:
                kinds[row] = "duplicate"
        elif own[0] >= 0.1:
            kinds[row] = "localisation"
            reachable.add(target)
        elif other[0] > 0.5:
            kinds[row] = "class"
        elif other[0] >= 0.1:
            kinds[row] = "both"
        else:
            kinds[row] = "background"
        if kinds[row] == "class":
            reachable.add((image, other[1]))
    missed = [
        not annotation["difficult"] and (image, number) not in claimed | reachable
        for image, record in enumerate(ground_truth)
        for number, annotation in enumerate(record["annotations"])
    ]
    return kinds, missed


@pytest.mark.parametrize("seed", range(5))
def test_kinds_are_those_of_a_plain_reference(seed):
    ground_truth, dets = random_scene(seed)
    found = sort_errors(ground_truth, dets)
    kinds, missed = slow_kinds(ground_truth, dets)
    assert found.kind.tolist() == kinds
    assert found.is_missed.tolist() == missed
    assert {*kinds, "missed"} == {*KINDS, "correct", "ignored"} and any(missed)  # the scenes have all of them


@pytest.mark.parametrize("seed", range(5))
def test_mending_never_lowers_the_ap_and_mending_all_makes_it_one(seed):
    ground_truth, dets = random_scene(seed)
    analysis = analyse_errors(ground_truth, dets, CLASSES)
    assert analysis.ap50 == pytest.approx(evaluate_voc(ground_truth, dets, CLASSES).metrics["AP50"])
    assert min(analysis.cost.values()) >= 0
    found = sort_errors(ground_truth, dets)
    mended = mend(ground_truth, dets, found, KINDS)
    assert evaluate_voc(*mended, CLASSES).metrics["AP50"] == 1
    assert set(sort_errors(*mended).kind) == {"correct"}


def test_the_bars_start_at_the_ap_and_add_the_costs():
    ground_truth, dets = random_scene(0)
    analysis = analyse_errors(ground_truth, dets, CLASSES)
    axes = plot_errors({"one": analysis, "other": analysis}).axes[0]
    widths = [bar.get_width() for bar in axes.patches[::2]]
    assert widths == pytest.approx([analysis.ap50, *analysis.cost.values()])
    assert axes.patches[2].get_x() == pytest.approx(analysis.ap50)
