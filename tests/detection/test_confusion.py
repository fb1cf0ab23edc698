"""Confusion matrix and curves against the score: plain slow references written from the rules, and cases by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pytest import approx

from common.errors import UserError
from detection.confusion import ALL, confidence_table, confuse, plot_confusion
from detection.evaluation import Evaluation, evaluate_voc, read_threshold
from detection.matching import Detections, list_objects, match_classes
from tests.detection.scenes import CLASSES, iou, scene

PLACE, ELSEWHERE = (0, 0, 10, 10), (50, 50, 60, 60)
CAT, DOG = range(2)


def best_of(box: list[float], annotations: list[dict], numbers: list[int]) -> int | None:
    """Which of the annotations overlaps a box most, the first of several, if by more than a half."""
    overlaps = [(iou(box, annotations[number]["bbox"]), -number) for number in numbers]
    overlap, number = max(overlaps, default=(0.0, 0))
    return -number if overlap > 0.5 else None


def plain_confusion(records: list[dict], detections: Detections, threshold: float) -> list[list[int]]:
    """The matrix, one detection after another: first each that is right, then what is left."""
    background = len(CLASSES)
    counts = [[0] * (background + 1) for _ in range(background + 1)]
    shown = [row for row in range(len(detections.score)) if detections.score[row] >= threshold]
    shown.sort(key=lambda row: -detections.score[row])
    taken, left = set(), []
    for row in shown:
        image, category = int(detections.image[row]), int(detections.category[row])
        annotations = records[image]["annotations"]
        own = [number for number, a in enumerate(annotations) if a["category_id"] == category]
        number = best_of(detections.box[row].tolist(), annotations, own)
        if number is not None and annotations[number]["difficult"]:
            continue
        if number is None or (image, number) in taken:
            left.append(row)
        else:
            taken.add((image, number))
            counts[category][category] += 1
    for row in left:
        image = int(detections.image[row])
        annotations = records[image]["annotations"]
        number = best_of(detections.box[row].tolist(), annotations, list(range(len(annotations))))
        seen = background
        if number is not None and not annotations[number]["difficult"] and (image, number) not in taken:
            taken.add((image, number))
            seen = annotations[number]["category_id"]
        counts[seen][int(detections.category[row])] += 1
    for image, record in enumerate(records):
        for number, annotation in enumerate(record["annotations"]):
            if not annotation["difficult"] and (image, number) not in taken:
                counts[annotation["category_id"]][background] += 1
    return counts


@pytest.mark.parametrize(("seed", "tied"), [(0, True), (1, True), (2, False), (3, False)])
def test_the_matrix_is_that_of_a_plain_reference(seed: int, tied: bool):
    records, detections = scene(seed, tied=tied)
    evaluation = evaluate_voc(records, detections, CLASSES)
    objects = list_objects(records)
    matches = match_classes(objects, detections, len(CLASSES))
    wrong_classes = 0
    for score in (evaluation.confidence[ALL].best[1], 0.8, 0.6, 0.4, 0.0):
        found = confuse(objects, detections, matches, score)
        assert found.counts.tolist() == plain_confusion(records, detections, score)
        # Rows are the objects, the diagonal is what the recall at this score says.
        assert found.counts[:-1].sum(axis=1).tolist() == [evaluation.per_class[name]["gts"] for name in CLASSES]
        recall = evaluation.confidence["cat"].at(np.array([score]))["recall"][0]
        assert found.counts[0, 0] == approx(recall * evaluation.per_class["cat"]["gts"])
        wrong_classes += found.counts[:-1, :-1].sum() - found.counts.trace()
    assert wrong_classes > 3
    assert evaluation.confusion.score == evaluation.confidence[ALL].best[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_curves_and_their_best_are_those_of_counting_anew_at_each_score(seed: int):
    records, detections = scene(seed, images=20)
    evaluation = evaluate_voc(records, detections, CLASSES)
    for names in ([name] for name in CLASSES), [CLASSES]:
        for of in names:
            curve = evaluation.confidence[of[0] if len(of) == 1 else ALL]
            best = (0.0, math.nan)
            for score in sorted(set(detections.score), reverse=True):
                counts = np.array(plain_confusion(records, detections, score))
                places = [CLASSES.index(name) for name in of]
                true = counts[places, places].sum()
                counted, gts = counts[:, places].sum(), counts[places].sum()
                at = curve.at(np.array([score])).iloc[0]
                if gts == 0:
                    assert np.isnan([at["recall"], at["F1"], *curve.best]).all()
                    continue
                assert at["precision"] == approx(true / counted if counted else math.nan, nan_ok=True)
                assert (at["recall"], at["F1"]) == approx((true / gts, 2 * true / (counted + gts)))
                best = max(best, (2 * true / (counted + gts), score), key=lambda pair: pair[0])
            if gts:
                assert curve.best == approx(best, nan_ok=True)


def evaluate(objects: list[tuple], found: list[tuple]) -> Evaluation:
    """Objects (class, box) or (class, box, difficult) and detections (class, score, box) of one image."""
    annotations = [{"category_id": c, "bbox": list(box), "difficult": int(any(d))} for c, box, *d in objects]
    zeros = np.zeros(len(found), dtype=np.int64)
    category, score, box = zip(*found, strict=True) if found else ((), (), ())
    detections = Detections(
        zeros, np.array(category, dtype=np.int64), np.array(score, dtype=float), np.reshape(box, (-1, 4)).astype(float)
    )
    return evaluate_voc([{"annotations": annotations}], detections, ["cat", "dog"])


@pytest.mark.parametrize(
    ("objects", "found", "counts"),
    [
        # Right, and a surer wrong class on the same place, which the right one leaves nothing to take.
        ([(CAT, PLACE)], [(CAT, 0.8, PLACE), (DOG, 0.9, PLACE)], [[1, 0, 0], [0, 0, 0], [0, 1, 0]]),
        # Another class than the object's, on one of two objects.
        (
            [(CAT, PLACE), (CAT, ELSEWHERE)],
            [(CAT, 0.8, ELSEWHERE), (DOG, 0.9, PLACE)],
            [[1, 1, 0], [0, 0, 0], [0, 0, 0]],
        ),
        # A missed one, and one that is found twice.
        ([(CAT, PLACE), (DOG, ELSEWHERE)], [(CAT, 0.9, PLACE), (CAT, 0.9, PLACE)], [[1, 0, 0], [0, 0, 1], [1, 0, 0]]),
        # On a difficult object of its class a detection is nothing; one of another class has found no object.
        (
            [(CAT, PLACE, True), (CAT, ELSEWHERE)],
            [(CAT, 0.9, ELSEWHERE), (CAT, 0.9, PLACE), (DOG, 0.9, PLACE)],
            [[1, 0, 0], [0, 0, 0], [0, 1, 0]],
        ),
        # Exactly half an overlap finds nothing; without a true positive the score is 0.5.
        ([(CAT, PLACE)], [(DOG, 0.9, (0, 0, 10, 5)), (DOG, 0.4, PLACE)], [[0, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([], [], [[0, 0, 0]] * 3),
    ],
)
def test_the_matrix_by_hand(objects: list[tuple], found: list[tuple], counts: list[list[int]]):
    assert evaluate(objects, found).confusion.counts.tolist() == counts


def test_the_best_threshold_by_hand():
    # Right, wrong, right, wrong: F1 is 2/3, 2/4, 4/5, 4/6 of two objects.
    found = [(CAT, 0.9, PLACE), (CAT, 0.8, (80, 80, 90, 90)), (CAT, 0.7, ELSEWHERE), (CAT, 0.6, (80, 0, 90, 9))]
    evaluation = evaluate([(CAT, PLACE), (CAT, ELSEWHERE)], found)
    assert evaluation.best == {"F1": approx(4 / 5), "threshold": 0.7}
    curve = evaluation.confidence["cat"]
    table = curve.at(np.array([1.0, 0.9, 0.85, 0.75, 0.65, -5.0]))
    assert table["precision"].tolist() == approx([math.nan, 1, 1, 1 / 2, 2 / 3, 2 / 4], nan_ok=True)
    assert table["recall"].tolist() == approx([0, 1 / 2, 1 / 2, 1 / 2, 1, 1])
    assert table["F1"].tolist() == approx([0, 2 / 3, 2 / 3, 2 / 4, 4 / 5, 4 / 6])


def test_the_picture_has_objects_in_rows_and_detections_in_columns():
    """One cat, taken for a dog: the first row, the second column."""
    axes = plot_confusion(evaluate([(CAT, PLACE)], [(DOG, 0.9, PLACE)]).confusion, ["cat", "dog"]).axes[0]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((1, 0), "1")]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("detected as", "object")


def test_curves_go_on_to_scores_above_1():
    """As other detectors have them."""
    table = confidence_table(evaluate([(CAT, PLACE)], [(CAT, 3.0, PLACE)]).confidence)
    assert (table["score"].min(), table["score"].max()) == (0, 3)
    assert table[table["class"] == "cat"]["recall"].tolist() == [1] * 101


def test_files_hold_the_matrix_and_the_curves(tmp_path: Path):
    evaluation = evaluate_voc(*scene(seed=3), CLASSES)
    evaluation.write(tmp_path)
    names = [*CLASSES, "(background)"]
    matrix = pd.read_csv(tmp_path / "confusion.csv", index_col="object")
    assert matrix.columns.tolist() == matrix.index.tolist() == names
    assert matrix.to_numpy().tolist() == evaluation.confusion.counts.tolist()

    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert {key: content[key] for key in ("F1", "threshold")} == evaluation.best
    assert (
        content["confusion"]["score"] == evaluation.confusion.score == read_threshold(str(tmp_path / "model_best.pth"))
    )
    counts = content["confusion"]["counts"]
    assert [[counts[row].get(column, 0) for column in names] for row in names] == matrix.to_numpy().tolist()

    curves = pd.read_csv(tmp_path / "f1_curves.csv")
    assert curves["class"].unique().tolist() == [*CLASSES, ALL]
    cat = curves[curves["class"] == "cat"]
    assert (cat["score"].min(), cat["score"].max(), len(cat)) == (0, 1, 101)
    expected = evaluation.confidence["cat"].at(np.arange(101) / 100)
    assert cat["F1"].to_numpy() == approx(expected["F1"].to_numpy(), abs=1e-4)
    for name in ("confusion", "f1_curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["background", "all classes"])
def test_a_class_may_have_the_name_of_a_row(tmp_path: Path, name: str):
    classes = [name, *CLASSES[1:]]
    evaluation = evaluate_voc(*scene(seed=3), classes)
    evaluation.write(tmp_path)
    counts = json.loads((tmp_path / "evaluation.json").read_text())["confusion"]["counts"]
    assert list(counts)[:-1] == classes
    assert counts[name][name] == evaluation.confusion.counts[0, 0] > 0


def test_the_threshold_of_the_training_comes_before_that_of_a_later_evaluation(tmp_path: Path):
    weights, later = tmp_path / "model_best.pth", tmp_path / "evaluation" / "evaluation.json"
    (tmp_path / "config.yaml").touch()  # a run folder
    later.parent.mkdir()
    later.write_text('{"threshold": 0.25}')
    assert read_threshold(str(weights)) == 0.25
    (tmp_path / "evaluation.json").write_text('{"threshold": 0.75}')
    assert read_threshold(str(weights)) == 0.75
    last = str(tmp_path / "model_last.pth")  # which the training has not measured
    assert read_threshold(last) == 0.25
    (later.parent / "environment.json").write_text(json.dumps([{"weights": last}, {"weights": str(weights)}]))
    with pytest.raises(UserError, match=r"/evaluation: is of .*model_best.pth; expected that of .* these weights"):
        read_threshold(last)


def test_nothing_found_has_no_threshold_and_is_drawn_all_the_same(tmp_path: Path):
    evaluation = evaluate([(CAT, PLACE)], [])
    assert evaluation.best == {"F1": 0, "threshold": approx(math.nan, nan_ok=True)}
    evaluation.write(tmp_path)
    with pytest.raises(UserError, match=r"evaluation.json: holds no threshold"):
        read_threshold(str(tmp_path / "model_best.pth"))
    with pytest.raises(UserError, match=r"evaluation.json: no such file"):
        read_threshold(str(tmp_path / "elsewhere" / "model_best.pth"))
    with pytest.raises(UserError, match=r"output/starts/FasterRCNN.V1/evaluation/evaluation.json: no such file"):
        read_threshold("torchvision://FasterRCNN.V1.COCO")
