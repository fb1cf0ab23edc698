"""The whole way from files to drawn pictures, and to the figures of an evaluation, beside the network alone."""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torchvision.io import write_jpeg
from torchvision.transforms.v2.functional import resize

from classification.evaluate import compute_logits
from classification.predict import BirdClassifier
from common.images import read_image
from common.prediction import Prediction
from common.runtime import default_device, keep_freed_memory
from detection.predict import Detector
from detection.trainer import Evaluator
from detection.voc import default_test, records_of, register_voc
from detection.voc_annotations import annotation_xml
from tools.bench.runs import CLASSES, save_faster_rcnn, save_resnet18, save_yolov3
from tools.bench.timing import Contender, compare, our_precision
from tools.predict import load_model, predict_files

ROUNDS = 3  # each is long
SIZE = (480, 640)
DRAWN = 5  # objects an image, in the mean
# Enough for the first image that is read and the last that is written not to count.
NETWORKS: dict[str, tuple[Callable[[Path, Path], None], int]] = {
    "ResNet-18": (save_resnet18, 256),
    "YOLOv3 Darknet-53": (save_yolov3, 64),
    "Faster R-CNN R50-FPN": (save_faster_rcnn, 32),
}


def pipeline(root: Path, most: int = 256, rounds: int = ROUNDS) -> pd.DataFrame:
    """Times `make predict`, with pictures and without, and `make eval-*`, loading of the model and start left out.

    The network alone runs on images that were read before, in the batches of `make predict`. Weights are random.

    Args:
        root: data root; its first test images are taken, again and again where they are too few.
        most: photographs of a network, at most.
        rounds: timed ones, after one of warm-up.
    """
    keep_freed_memory()
    rows: list[dict] = []
    for name, (save, count) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            run, data, out = (Path(folder) / part for part in ("run", "data", "out"))
            save(root, run)
            photographs = write_photographs(root, data, min(most, count))
            model = load_model(str(run))
            samples = [model.prepare(read_image(path)) for path in photographs]
            batches = [samples[start : start + model.batch_size] for start in range(0, len(samples), model.batch_size)]

            def network(model: Detector | BirdClassifier = model, batches: list = batches) -> list[Prediction]:
                return [prediction for batch in batches for prediction in model.run(batch)]

            scores = np.sort(np.concatenate([prediction.scores for prediction in network()]))
            predict = partial(_silently, predict_files, model, photographs, out, scores[-DRAWN * len(samples) :][0])
            precision = "float32" if isinstance(model, BirdClassifier) else our_precision(default_device())
            ways: dict[str, Callable[[], object]] = {
                "the network alone": network,
                "make predict": predict,
                "make predict DRAW=0": partial(predict, has_pictures=False),
                "make eval": partial(_silently, evaluation(model, data, photographs)),
            }
            contenders = [Contender(way, call, precision) for way, call in ways.items()]
            rows += compare(f"{name}, {len(samples)} x {SIZE[0]} x {SIZE[1]}", contenders, rounds, len(samples))
    return pd.DataFrame(rows).rename(columns={"times as fast": "times the network"}).drop(columns="ours is")


def write_photographs(root: Path, folder: Path, count: int) -> list[Path]:
    """Fills a VOC-layout folder, the list `test` alone, with test images of a data root at `SIZE`, and their boxes.

    Returns:
        Their files.
    """
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("\n".join(CLASSES))
    register_voc(root)
    records = records_of(default_test(root))
    height, width = SIZE
    paths = []
    for number in range(count):
        record = records[number % len(records)]
        path = folder / "JPEGImages" / f"{number:05d}.jpg"
        write_jpeg(resize(read_image(record["file_name"]), list(SIZE)), str(path), quality=92)
        scale = np.array([width / record["width"], height / record["height"]] * 2)
        objects = [
            (CLASSES[each["category_id"]], (np.array(each["bbox"]) * scale).tolist()) for each in record["annotations"]
        ]
        (folder / "Annotations" / f"{path.stem}.xml").write_text(annotation_xml(path.name, height, width, objects))
        paths.append(path)
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(path.stem for path in paths))
    return paths


def evaluation(model: Detector | BirdClassifier, folder: Path, photographs: list[Path]) -> Callable[[], object]:
    """What `make eval-*` does with a model that is loaded, on a folder of photographs."""
    if isinstance(model, Detector):
        register_voc(folder)
        cfg = model.cfg.clone()
        cfg.DATASETS.TEST = default_test(folder)
        return partial(Evaluator(cfg).evaluate, model.model)
    return partial(compute_logits, model, photographs)


def _silently(call: Callable[..., object], *arguments: object, **options: object) -> None:
    with redirect_stdout(io.StringIO()):
        call(*arguments, **options)
