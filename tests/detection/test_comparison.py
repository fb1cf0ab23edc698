"""What two detectors have in common, on hand-made detections."""

import numpy as np
import pandas as pd
import pytest

from detection.comparison import compare, objects_table, photographs_table, to_detections


def thing(name: str, x: float, score: float = 0.9, width: float = 100) -> dict:
    return {"class": name, "score": score, "bbox": [x, 0.0, width, 100.0]}


def pairs(first: list[dict], second: list[dict]) -> list[tuple]:
    rows = compare({"A": first, "B": second})
    assert all(list(row) == ["agreement", "iou", "A", "B"] for row in rows)
    return [(row["agreement"], row["A"] and row["A"]["score"], row["B"] and row["B"]["score"]) for row in rows]


def test_every_way_to_agree_and_to_differ():
    first = [thing("dog", 0, 0.9), thing("cow", 200, 0.8), thing("cat", 400, 0.7)]
    second = [thing("cat", 900, 0.6), thing("dog", 0, 0.5, width=80), thing("horse", 200, 0.4)]
    rows = compare({"A": first, "B": second})
    assert rows == [
        {"agreement": "both", "iou": pytest.approx(0.8), "A": first[0], "B": second[1]},
        {"agreement": "other class", "iou": 1.0, "A": first[1], "B": second[2]},
        {"agreement": "only A", "iou": None, "A": first[2], "B": None},
        {"agreement": "only B", "iou": None, "A": None, "B": second[0]},
    ]


def test_the_same_place_begins_at_an_iou_of_a_half():
    assert pairs([thing("dog", 0, 0.9)], [thing("dog", 0, 0.8, width=50)]) == [("both", 0.9, 0.8)]
    apart = [("only A", 0.9, None), ("only B", None, 0.8)]
    assert pairs([thing("dog", 0, 0.9)], [thing("dog", 0, 0.8, width=49)]) == apart


def test_each_object_is_in_one_pair_with_the_one_that_overlaps_best():
    first = [thing("dog", 0, 0.9), thing("dog", 30, 0.8)]
    second = [thing("dog", 20, 0.7), thing("dog", 300, 0.6)]
    assert pairs(first, second) == [("both", 0.8, 0.7), ("only A", 0.9, None), ("only B", None, 0.6)]


def test_the_same_class_comes_before_a_better_overlap_of_another():
    first, second = [thing("dog", 0, 0.9)], [thing("cow", 0, 0.8), thing("dog", 10, 0.7)]
    assert pairs(first, second) == [("both", 0.9, 0.7), ("only B", None, 0.8)]


def test_one_detector_or_both_find_nothing():
    assert pairs([], []) == []
    assert pairs([thing("dog", 0, 0.9)], []) == [("only A", 0.9, None)]
    assert pairs([], [thing("dog", 0, 0.9)]) == [("only B", None, 0.9)]


@pytest.fixture
def photographs() -> list[dict]:
    first = [thing("dog", 0), thing("cow", 200), thing("cat", 400)]
    second = [thing("dog", 0), thing("horse", 200)]
    return [
        {"file_name": "a.jpg", "milliseconds": {"A": 30.0, "B": 10.0}, "objects": compare({"A": first, "B": second})},
        {"file_name": "b.jpg", "milliseconds": {"A": 20.0, "B": 11.0}, "objects": compare({"A": [], "B": second})},
        {"file_name": "c.jpg", "milliseconds": {"A": 90.0, "B": 12.0}, "objects": []},
    ]


def test_table_of_photographs(photographs):
    expected = pd.DataFrame(
        {
            "photograph": ["a.jpg", "b.jpg", "c.jpg", "sum, median ms"],
            "A": [3, 0, 0, 3],
            "B": [2, 2, 0, 4],
            "both": [1, 0, 0, 1],
            "other class": [1, 0, 0, 1],
            "only A": [1, 0, 0, 1],
            "only B": [0, 2, 0, 2],
            "A ms": [30.0, 20.0, 90.0, 30.0],
            "B ms": [10.0, 11.0, 12.0, 11.0],
        }
    )
    pd.testing.assert_frame_equal(photographs_table(photographs, ["A", "B"]), expected)


def test_table_of_objects(photographs):
    table = objects_table(photographs, ["A", "B"])
    assert table["agreement"].tolist() == ["both", "other class", "only A", "only B", "only B"]
    assert table["photograph"].tolist() == ["a.jpg"] * 3 + ["b.jpg"] * 2
    swapped = table.iloc[1]
    assert (swapped["A class"], swapped["B class"], swapped["iou"]) == ("cow", "horse", 1.0)
    assert swapped[["B x", "B y", "B width", "B height"]].tolist() == [200, 0, 100, 100]
    assert table.loc[table["agreement"] == "only B", ["iou", "A class", "A score", "A x"]].isna().all(axis=None)
    assert list(objects_table([], ["A", "B"]).columns) == list(table.columns)


def test_objects_become_detections_by_the_names_of_their_classes():
    found = to_detections([[thing("cow", 5, 0.9)], [], [thing("dog", 0, 0.2), thing("cow", 7, 0.1)]], ["dog", "cow"])
    assert found.image.tolist() == [0, 2, 2]
    assert found.category.tolist() == [1, 0, 1]
    assert found.score.tolist() == [0.9, 0.2, 0.1]
    np.testing.assert_array_equal(found.box, [[5, 0, 105, 100], [0, 0, 100, 100], [7, 0, 107, 100]])
    assert to_detections([[], []], ["dog"]).box.shape == (0, 4)
