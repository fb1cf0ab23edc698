"""The evaluator against hand-computed numbers, a slow plain devkit, Detectron2's and COCO's own evaluators."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pytest import approx

from detection.evaluation import Evaluation, VOCEvaluator, evaluate_voc
from detection.matching import Detections
from tests.detection.scenes import CLASSES, ONE_BASED, THRESHOLDS, detect, objects, plain_devkit, scene


def best(evaluation: Evaluation, name: str) -> dict[str, float]:
    """The best F1 of a class, which is checked elsewhere."""
    return dict(zip(("F1", "threshold"), evaluation.confidence[name].best, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_a_plain_devkit(seed: int):
    records, detections = scene(seed)
    evaluation = evaluate_voc(records, detections, CLASSES)
    means = {name: [] for name in evaluation.metrics}
    for category, name in enumerate(CLASSES):
        expected = [plain_devkit(records, detections, category, threshold) for threshold in THRESHOLDS]
        row = {key: expected[0][key] for key in ("gts", "dets", "recall")}
        row |= {"AP50_11point": expected[0]["eleven"], "AP50": expected[0]["area"], "AP75": expected[5]["area"]}
        row |= {"AP": sum(at["area"] for at in expected) / 10}
        assert evaluation.per_class[name] == pytest.approx(row | best(evaluation, name), abs=1e-9, nan_ok=True)
        for key, values in means.items():
            values.append(row[key])
    expected = {key: np.nanmean(values) for key, values in means.items()}
    assert evaluation.metrics == pytest.approx(expected, abs=1e-9)
    # The scene holds what it is meant to hold.
    assert evaluation.per_class["cow"]["gts"] == evaluation.per_class["owl"]["gts"] == 0
    assert evaluation.per_class["ant"]["dets"] == 0 == evaluation.per_class["ant"]["AP50"]
    assert 0.05 < evaluation.metrics["AP"] < evaluation.metrics["AP50"] < 0.9


def test_agrees_with_detectron2_on_its_own_files(tmp_path: Path):
    records, detections = scene(seed=100, images=60, tied=False)  # Detectron2's sort is not stable
    for record in records:
        lines = [
            f"<object><name>{CLASSES[a['category_id']]}</name><pose>Left</pose><truncated>0</truncated>"
            f"<difficult>{a['difficult']}</difficult><bndbox><xmin>{int(a['bbox'][0]) + 1}</xmin>"
            f"<ymin>{int(a['bbox'][1]) + 1}</ymin><xmax>{int(a['bbox'][2])}</xmax><ymax>{int(a['bbox'][3])}</ymax>"
            "</bndbox></object>"
            for a in record["annotations"]
        ]
        (tmp_path / f"{record['image_id']}.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")
    (tmp_path / "test.txt").write_text("\n".join(record["image_id"] for record in records))
    for category, name in enumerate(CLASSES):
        lines = [
            " ".join([records[image]["image_id"], *(repr(float(x)) for x in (score, *(box + ONE_BASED)))])
            for image, label, score, box in zip(*vars(detections).values(), strict=True)
            if label == category
        ]
        (tmp_path / f"{name}.det").write_text("\n".join(lines))

    evaluation = evaluate_voc(records, detections, CLASSES)
    for name in CLASSES[:3]:
        files = f"{tmp_path}/{{}}.det", f"{tmp_path}/{{}}.xml", f"{tmp_path}/test.txt", name
        areas = [voc_eval(*files, ovthresh=threshold)[2] for threshold in THRESHOLDS]
        recall, _, eleven = voc_eval(*files, ovthresh=0.5, use_07_metric=True)
        row = evaluation.per_class[name]
        assert row["AP50_11point"] == pytest.approx(eleven, abs=1e-9)
        assert row["recall"] == pytest.approx(recall[-1], abs=1e-9)
        assert [row["AP50"], row["AP75"], row["AP"]] == pytest.approx([areas[0], areas[5], np.mean(areas)], abs=1e-9)


def test_both_metrics_by_hand():
    # Right, wrong, right on two objects: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1.
    records = objects((0, 0, 10, 10), (50, 50, 60, 60))
    detections = detect((0.9, 0, 0, 10, 10), (0.8, 20, 20, 30, 30), (0.7, 50, 50, 60, 60))
    evaluation = evaluate_voc(records, detections, ["cat"])
    assert evaluation.metrics == pytest.approx(
        {"AP50_11point": (6 * 1 + 5 * 2 / 3) / 11, "AP50": 5 / 6, "AP75": 5 / 6, "AP": 5 / 6}
    )
    assert evaluation.per_class["cat"] == evaluation.metrics | {
        "gts": 2, "dets": 3, "recall": 1.0, "F1": 0.8, "threshold": 0.7  # of both objects, with one wrong detection
    }  # fmt: skip
    recall, precision = evaluation.curves["cat"]
    assert recall.tolist() == [0.5, 1.0] and precision == pytest.approx([1, 2 / 3])


def test_each_rule_of_the_devkit_alone():
    cat = (0, 0, 10, 10)
    half = (0, 0, 10, 5)  # IoU exactly 0.5

    def ap(records: list[dict], *rows: tuple[float, ...]) -> float:
        return evaluate_voc(records, detect(*rows), ["cat"]).metrics["AP50"]

    assert ap(objects(cat), (0.9, *half)) == 0, "the overlap must be greater than the threshold"
    assert ap(objects(cat), (0.9, 0, 0, 10, 5.01)) == 1
    assert ap(objects(cat), (0.9, *cat), (0.8, *cat)) == 1
    assert ap(objects(cat, (50, 0, 60, 10)), (0.9, *cat), (0.8, *cat), (0.7, 50, 0, 60, 10)) == pytest.approx(5 / 6)
    # The second detection overlaps the taken box most, so it is wrong although the other box is free and near.
    assert ap(objects(cat, (2, 0, 12, 10)), (0.9, *cat), (0.8, 0.5, 0, 10.5, 10)) == 0.5
    # On a difficult box detections do not count, however many.
    difficult = objects((50, 0, 60, 10), cat, difficult=(0,))
    assert ap(difficult, (0.9, 50, 0, 60, 10), (0.8, 50, 0, 60, 10), (0.7, *cat)) == 1
    # Of equal scores the first given comes first.
    assert ap(objects(cat), (0.5, *cat), (0.5, 80, 80, 90, 90)) == 1
    assert ap(objects(cat), (0.5, 80, 80, 90, 90), (0.5, *cat)) == 0.5
    # An annotation that says nothing about difficulty is not difficult.
    assert evaluate_voc([{"annotations": [{"bbox": cat, "category_id": 0}]}], detect(), ["cat"]).per_class["cat"] == {
        "gts": 1, "dets": 0, "recall": 0.0, "AP50_11point": 0.0, "AP50": 0.0, "AP75": 0.0, "AP": 0.0, "F1": 0.0,
        "threshold": pytest.approx(math.nan, nan_ok=True),
    }  # fmt: skip


def test_nothing_at_all_is_nan_and_not_an_error():
    evaluation = evaluate_voc([], detect(), CLASSES)
    assert all(math.isnan(value) for value in evaluation.metrics.values())
    assert "mAP" in evaluation.format_table()


@pytest.mark.parametrize(
    "detections",
    [
        Detections(np.array([1]), np.array([0]), np.array([0.5]), np.zeros((1, 4))),
        Detections(np.array([0]), np.array([-1]), np.array([0.5]), np.zeros((1, 4))),
        Detections(np.array([0]), np.array([0]), np.array([0.5, 0.5]), np.zeros((2, 4))),
        Detections(np.array([0]), np.array([0]), np.array([0.5]), np.zeros(4)),
    ],
)
def test_impossible_detections_are_refused(detections: Detections):
    with pytest.raises(ValueError, match="detections"):
        evaluate_voc(objects((0, 0, 1, 1)), detections, ["cat"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    evaluation = evaluate_voc(*scene(seed=3), CLASSES)
    evaluation.write(folder)
    return evaluation, folder


def test_json_has_the_documented_keys(written: tuple[Evaluation, Path]):
    evaluation, folder = written
    content = json.loads((folder / "evaluation.json").read_text())
    groups = ["sizes", "aspects", "confusion", "per_class"]
    assert list(content) == ["AP50_11point", "AP50", "AP75", "AP", "F1", "threshold", *groups]
    assert list(content["sizes"]) == ["small", "medium", "large"]
    assert list(content["aspects"]) == ["tall", "square", "wide"]
    assert {key: content[key] for key in evaluation.metrics} == evaluation.metrics
    assert list(content["per_class"]) == CLASSES
    keys = ["gts", "dets", "recall", "AP50_11point", "AP50", "F1", "threshold"]
    assert all(list(row) == keys for row in content["per_class"].values())
    assert content["per_class"]["cat"] == {key: evaluation.per_class["cat"][key] for key in content["per_class"]["cat"]}
    assert content["per_class"]["cow"] | {"dets": 0} == {
        "gts": 0, "dets": 0, "recall": None, "AP50_11point": None, "AP50": None, "F1": None, "threshold": None
    }  # fmt: skip


def test_table_csv_and_markdown_hold_the_same_numbers(written: tuple[Evaluation, Path]):
    evaluation, folder = written
    rows = {row["class"]: row for row in csv.DictReader((folder / "evaluation.csv").open())}
    assert list(rows) == [*CLASSES, "mAP"]
    for name in CLASSES:
        expected = evaluation.per_class[name]
        assert {key: float(rows[name][key] or "nan") for key in expected} == pytest.approx(expected, nan_ok=True)
    means = evaluation.metrics | evaluation.best
    assert {key: float(rows["mAP"][key]) for key in means} == pytest.approx(means)

    for text in (evaluation.format_table(), (folder / "evaluation.md").read_text()):
        lines = {
            cells[0]: cells[1:] for line in text.splitlines() if len(cells := line.replace("|", " ").split()) == 10
        }
        assert lines["class"] == ["gts", "dets", "recall", "AP50_11point", "AP50", "AP75", "AP", "F1", "threshold"]
        cat = evaluation.per_class["cat"]
        figures = [f"{cat[key]:.3f}" for key in ("recall", "AP50_11point", "AP50", "AP75", "AP", "F1", "threshold")]
        assert lines["cat"] == [str(cat["gts"]), str(cat["dets"]), *figures]
        assert lines["mAP"] == ["-", "-", "-", *(f"{value:.3f}" for value in means.values())]


def test_picture_has_a_panel_for_each_class(written: tuple[Evaluation, Path]):
    evaluation, folder = written
    figure = evaluation._plot_curves()
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles[0] == f"cat  {evaluation.per_class['cat']['AP50']:.3f}" and titles[3] == "cow  no objects"
    assert len(titles) == len(CLASSES)
    # What is filled is the AP.
    path = figure.axes[0].collections[0].get_paths()[0].vertices
    shoelace = abs(np.sum(path[:-1, 0] * path[1:, 1] - path[1:, 0] * path[:-1, 1])) / 2
    assert shoelace == pytest.approx(evaluation.per_class["cat"]["AP50"])
    assert (folder / "pr_curves.png").read_bytes().startswith(b"\x89PNG")


def register(name: str, records: list[dict]) -> None:
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(thing_classes=CLASSES)


@pytest.fixture
def registered(request: pytest.FixtureRequest):
    """Registers dataset dicts under the name of the test, for its duration."""
    name = request.node.name

    def register_here(records: list[dict]) -> str:
        register(name, records)
        return name

    yield register_here
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def feed(evaluator: VOCEvaluator, records: list[dict], detections: Detections, images: list[int]) -> None:
    for image in images:
        rows = detections.image == image
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(torch.tensor(detections.box[rows], dtype=torch.float32))
        instances.scores = torch.tensor(detections.score[rows], dtype=torch.float32)
        instances.pred_classes = torch.tensor(detections.category[rows])
        evaluator.process([records[image]], [{"instances": instances}])


def test_evaluator_gathers_what_the_model_says(registered: Callable, tmp_path: Path):
    records, detections = scene(seed=7)
    evaluator = VOCEvaluator(registered(records))
    feed(evaluator, records, detections, [0, 1, 2])
    evaluator.reset()
    feed(evaluator, records, detections, list(range(1, len(records))))  # all but one image
    result = evaluator.evaluate()
    rows = np.argsort(detections.image, kind="stable")
    rows = rows[detections.image[rows] > 0]
    expected = evaluate_voc(records, Detections(*(array[rows] for array in vars(detections).values())), CLASSES)
    assert set(result["bbox"]) == {"AP50_11point", "AP50", "AP75", "AP"}
    # Single precision keeps the order and the ties of these scores and every digit of these boxes.
    assert result["bbox"] == pytest.approx(expected.metrics)
    with_objects = ["cat", "dog", "hen", "ant"]
    assert result["per_class"] == approx({name: expected.per_class[name]["AP50_11point"] for name in with_objects})
    evaluator.write(tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["AP"] == result["bbox"]["AP"]


def test_scores_keep_every_digit(registered: Callable, tmp_path: Path):
    record = objects((60, 60, 70, 70))[0]
    instances = Instances((100, 100), pred_boxes=Boxes([[0, 0, 9, 9], [60, 60, 70, 70]]))
    instances.scores = torch.tensor([0.1, 0.10000001])  # neighbours in single precision
    instances.pred_classes = torch.tensor([0, 0])
    assert instances.scores[0] < instances.scores[1]
    evaluator = VOCEvaluator(registered([record]))
    evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP50"] == 1
    evaluator.write(tmp_path)
    found = json.loads((tmp_path / "detections.json").read_text())
    assert sorted(row["score"] for row in found) == approx(instances.scores.tolist(), abs=1e-15)


def test_detections_file_is_in_coco_results_form(registered: Callable, tmp_path: Path):
    """COCO's own evaluator reads the file, and on objects far apart its matching is the same as the devkit's."""
    rng = np.random.default_rng(0)
    records, image, box, category = [], [], [], []
    for number in range(30):
        corner = np.stack(np.meshgrid(np.arange(0, 400, 100.0), np.arange(0, 200, 100.0)), axis=-1).reshape(-1, 2)
        gt = np.concatenate([corner, corner + rng.integers(30, 60, corner.shape)], axis=1)
        labels = rng.integers(0, len(CLASSES), len(gt))
        annotations = [{"bbox": b.tolist(), "category_id": int(c)} for b, c in zip(gt, labels, strict=True)]
        records.append({"image_id": f"{number:06d}", "annotations": annotations})
        found = rng.integers(0, len(gt), 12)
        box.append(gt[found] + rng.integers(-8, 9, (12, 4)))
        category.append(np.where(rng.random(12) < 0.8, labels[found], 0))
        image.append(np.full(12, number))
    score = rng.permutation(30 * 12) / 360
    detections = Detections(np.concatenate(image), np.concatenate(category), score, np.concatenate(box))
    evaluator = VOCEvaluator(registered(records))
    feed(evaluator, records, detections, list(range(30)))
    evaluator.evaluate()
    evaluator.write(tmp_path)

    truth = COCO()
    boxes = [(record["image_id"], a["category_id"] + 1, a["bbox"]) for record in records for a in record["annotations"]]
    truth.dataset = {
        "info": {},
        "images": [{"id": record["image_id"]} for record in records],
        "categories": [{"id": number} for number in range(1, len(CLASSES) + 1)],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            for number, (image_id, category_id, (x0, y0, x1, y1)) in enumerate(boxes, start=1)
        ],
    }
    truth.createIndex()
    coco = COCOeval(truth, truth.loadRes(str(tmp_path / "detections.json")), "bbox")
    coco.evaluate()
    coco.accumulate()

    curves = evaluate_voc(records, detections, CLASSES).curves
    for category, (recall, precision) in enumerate(curves.values()):
        assert recall[-1] == pytest.approx(coco.eval["recall"][0, category, 0, -1])
        sampled = [max(precision[recall >= r], default=0) for r in coco.params.recThrs]
        assert sampled == pytest.approx(coco.eval["precision"][0, :, category, 0, -1])


def evaluate_in_two_processes(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    records, detections = scene(seed=7)
    register("shared_out", records)
    evaluator = VOCEvaluator("shared_out")
    images = list(range(rank, len(records), 2))
    feed(evaluator, records, detections, [*images, 1])  # a sampler that pads gives both processes image 1
    (folder / f"result{rank}.json").write_text(json.dumps(evaluator.evaluate()))
    evaluator.write(folder / str(rank))
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(registered: Callable, tmp_path: Path):
    records, detections = scene(seed=7)
    evaluator = VOCEvaluator(registered(records))
    feed(evaluator, records, detections, list(range(len(records))))
    mp.spawn(evaluate_in_two_processes, args=(tmp_path,), nprocs=2)
    assert json.loads((tmp_path / "result0.json").read_text()) == evaluator.evaluate()
    assert json.loads((tmp_path / "result1.json").read_text()) == {}
    assert (tmp_path / "0" / "evaluation.json").exists() and not (tmp_path / "1").exists()


def test_detections_of_a_batch_are_copied_from_a_gpu_at_once(gpu):
    outputs = []
    for count in (2, 0, 3):
        boxes, scores = Boxes(torch.rand(count, 4, device="cuda")), torch.rand(count, device="cuda")
        classes = torch.arange(count, device="cuda")
        outputs.append({"instances": Instances((9, 9), pred_boxes=boxes, scores=scores, pred_classes=classes)})
    evaluator = VOCEvaluator("any")
    gpu.waits.clear()
    evaluator.process([{"image_id": name} for name in "abc"], outputs)
    assert [wait.kind for wait in gpu.waits] == ["copy to the host"]
    for rows, output in zip(evaluator._by_image.values(), outputs, strict=True):
        found = output["instances"].to("cpu")
        assert rows[:, :4].tolist() == found.pred_boxes.tensor.tolist()
        assert rows[:, 4:].tolist() == [
            list(pair) for pair in zip(found.scores.tolist(), range(len(found)), strict=True)
        ]


def test_class_names_with_dollars_and_hundreds_of_classes_are_drawn(tmp_path):
    """Of 300 classes the picture shows 40, by twenties from either end: 20 are not found, the others are."""
    names = [f"price_$1_$2_{number}" for number in range(300)]
    boxes = [{"bbox": [0, 0, 9, 9], "category_id": number, "difficult": 0} for number in range(300)]
    found = np.arange(20, 300)
    detections = Detections(np.zeros(280, int), found, np.ones(280), np.tile([0, 0, 9, 9.0], (280, 1)))
    evaluation = evaluate_voc([{"annotations": boxes}], detections, names)
    figure = evaluation._plot_curves()
    titles = [axes.get_title().split("  ") for axes in figure.axes if axes.get_title()]
    assert [float(ap) for _, ap in titles] == [0.0] * 20 + [1.0] * 20
    assert {name for name, _ in titles[:20]} == set(names[:20])
    evaluation.write(tmp_path)
    assert (tmp_path / "pr_curves.png").stat().st_size > 10_000


def test_a_picture_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(self: Evaluation) -> None:
        raise ValueError("no such font\nat all")

    monkeypatch.setattr(Evaluation, "_plot_curves", fail)
    evaluate_voc(*scene(0), CLASSES).write(tmp_path)
    assert (tmp_path / "evaluation.json").is_file() and not (tmp_path / "pr_curves.png").exists()
    assert "pr_curves.png: not drawn (no such font)" in caplog.text
