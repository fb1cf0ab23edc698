"""Reading and evaluating Pascal VOC beside Detectron2's own ways."""

import itertools
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances as load_voc_instances_of_stock
from detectron2.evaluation import DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from common.errors import UserError
from detection.bootstrap import RESAMPLES, resample_ap
from detection.evaluation import VOCEvaluator
from detection.matching import Detections
from detection.voc import VOC_CLASSES, load_voc_instances
from tools.bench.timing import ROUNDS, Contender, compare, in_turn, rows, seconds_of

STOCK = "stock Detectron2"


def loader(root: Path, images: int = 16551, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times reading the annotations of VOC07+12 trainval, 16,551 files, for the first time and from the cache.

    Args:
        root: data root, whose annotations are repeated until there are enough.
        images: annotation files.
        rounds: timed ones, after one of warm-up.
    """
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        write_voc_folder(tree, root, images)

        def first() -> None:
            shutil.rmtree(tree / ".voc_cache", ignore_errors=True)
            load_voc_instances(tree, "trainval", VOC_CLASSES)

        read = partial(load_voc_instances, tree, "trainval", VOC_CLASSES)
        stock = partial(load_voc_instances_of_stock, str(tree), "trainval", VOC_CLASSES)
        contenders = [Contender("ours", first, threads=1), Contender(STOCK, stock, threads=1)]
        table = compare(f"reading {images} annotations", contenders, rounds)
        return pd.DataFrame(
            table + compare("the same again, from the cache", [Contender("ours", read, threads=1)], rounds)
        )


def evaluator(root: Path, images: int = 4952, detections: int = 100, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times taking in and scoring detections on as many images as VOC07 test has, with all figures of an evaluation.

    Detectron2's evaluator, which has AP alone, is timed once. Then the bootstrap, which nothing else has.

    Args:
        root: data root, whose annotations are repeated until there are enough.
        images: images.
        detections: detections on each.
        rounds: timed ones, after one of warm-up.
    """
    name = "bench_voc_evaluator"
    with tempfile.TemporaryDirectory() as folder:
        write_voc_folder(Path(folder), root, images)
        records = load_voc_instances(Path(folder), "trainval", VOC_CLASSES)
        outputs = random_detections(records, detections)
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(VOC_CLASSES), dirname=folder, split="trainval", year=2007)
        try:
            ours, stock = VOCEvaluator(name), PascalVOCDetectionEvaluator(name)
            contenders = [
                Contender("ours, all figures", partial(_evaluate, ours, records, outputs), threads=1),
                Contender(f"{STOCK}, AP alone", partial(_evaluate, stock, records, outputs), threads=1),
            ]
            timed = in_turn(contenders[:1], rounds)[0][1:], [seconds_of(contenders[1].run)]
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    what = f"{images} images of {detections} detections"
    bootstrap = partial(resample_ap, records, to_detections(outputs), len(VOC_CLASSES))
    spread = compare(f"{RESAMPLES} resamples of {what}", [Contender("ours", bootstrap)], rounds)
    return pd.DataFrame(rows(f"evaluating {what}", contenders, timed) + spread)


def write_voc_folder(folder: Path, root: Path, images: int) -> None:
    """Makes a VOC-layout folder of a root's annotations, repeated as often as needed, with empty files as images.

    Annotations with coordinates that are no integers stay out: Detectron2's evaluator cannot read them.

    Raises:
        UserError: the root holds no annotation to take.
    """
    texts = [path.read_bytes() for path in sorted(root.glob("**/Annotations/*.xml"))]
    texts = [text for text in texts if not re.search(rb"<[xy]m(in|ax)>\s*\d+\.", text)]
    if not texts:
        raise UserError(f"{root}: no Annotations/*.xml in it; expected a data root, see `make check-datasets`")
    ids = [f"{number:06d}" for number in range(images)]
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for image_id, text in zip(ids, itertools.cycle(texts), strict=False):
        (folder / "Annotations" / f"{image_id}.xml").write_bytes(text)
        (folder / "JPEGImages" / f"{image_id}.jpg").touch()
    (folder / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(ids))


def random_detections(records: list[dict], count: int) -> list[Instances]:
    """`count` detections per image; a third of them near an object, if there is one, most of these with its class."""
    rng = np.random.default_rng(0)
    outputs = []
    for record in records:
        size = np.array([record["width"], record["height"]])
        corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * size
        boxes, classes = corners.reshape(count, 4), rng.integers(0, len(VOC_CLASSES), count)
        scores = rng.beta(1, 6, count)
        if annotations := record["annotations"]:
            near = np.flatnonzero(rng.random(count) < 1 / 3)
            object_of = rng.integers(0, len(annotations), len(near))
            boxes[near] = np.array([box["bbox"] for box in annotations])[object_of] + rng.normal(0, 8, (len(near), 4))
            is_right = rng.random(len(near)) < 0.9
            right = np.array([box["category_id"] for box in annotations])[object_of]
            classes[near] = np.where(is_right, right, classes[near])
            scores[near] = rng.beta(4, 2, len(near))
        outputs.append(
            Instances(
                (record["height"], record["width"]),
                pred_boxes=Boxes(torch.tensor(boxes)),
                scores=torch.tensor(scores),
                pred_classes=torch.tensor(classes),
            )
        )
    return outputs


def to_detections(outputs: list[Instances]) -> Detections:
    """Detections on all images in the form that the evaluation reads."""
    return Detections(
        np.repeat(np.arange(len(outputs)), [len(instances) for instances in outputs]),
        np.concatenate([instances.pred_classes.numpy() for instances in outputs]),
        np.concatenate([instances.scores.numpy() for instances in outputs]),
        np.concatenate([instances.pred_boxes.tensor.numpy() for instances in outputs]),
    )


def _evaluate(evaluator: DatasetEvaluator, records: list[dict], outputs: list[Instances]) -> None:
    evaluator.reset()
    for record, instances in zip(records, outputs, strict=True):
        evaluator.process([record], [{"instances": instances}])
    evaluator.evaluate()
