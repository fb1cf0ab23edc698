"""Reading and augmenting training images in one process, beside torchvision's reference, Detectron2 and ultralytics."""

import ctypes
import itertools
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper as StockDatasetMapper
from torchvision import tv_tensors
from torchvision.io import write_jpeg
from torchvision.transforms import v2

from common.images import read_image
from common.runtime import default_device
from detection.augmentation import build_augmentations
from detection.config import CONFIGS, get_cfg, merge_file
from detection.data_loader import build_training_stream
from detection.dataset_mapper import DatasetMapper
from detection.voc import VOC_CLASSES, default_train, records_of, register_voc
from tools.bench.faster_rcnn import Detector, build_ours, read_samples
from tools.bench.rivals import has_ultralytics
from tools.bench.timing import ROUNDS, Contender, compare, our_precision

if TYPE_CHECKING:
    from ultralytics.data import YOLODataset

RECIPES = {"Faster R-CNN": "faster_rcnn_R_50_FPN", "YOLOv3": "yolov3_darknet53"}

# From a dataset dict to a sample, at random.
Mapper = Callable[[dict], object]
T = TypeVar("T")


def training_images(
    root: Path,
    images: int = 100,
    rounds: int = ROUNDS,
    large: tuple[int, int] = (3000, 4000),
    size: tuple[int, int] = (600, 800),
) -> pd.DataFrame:
    """Times both best recipes on the photographs of `root` and on one of 12 megapixels, whose memory is told too.

    Our recipe for YOLOv3 mixes every image with a second one; no rival does, but ultralytics makes mosaics of four
    images, three of them from its buffer.

    Args:
        root: data root.
        images: images to map.
        rounds: timed ones, after one of warm-up.
        large: height and width of the large photograph, the first of `root` made larger.
        size: height and width of the images of a training step, whose rate is told for comparison.
    """
    register_voc(root)
    records = records_of(default_train(root))
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        enlarged = enlarge(records[0], folder / "large.jpg", large)
        for model, config in RECIPES.items():
            cfg = get_cfg()
            merge_file(cfg, CONFIGS / f"{config}.yaml")
            stream, mapper = build_training_stream(cfg, records), DatasetMapper(cfg, True, dataset_dicts=records)
            order = [records[index] for index in itertools.islice(itertools.cycle(stream.order(0)), images)]
            rivals: dict[str, Mapper] = {"torchvision's reference": ReferenceMapper(cfg, mapper.square_size)}
            if model == "Faster R-CNN":
                rivals["stock Detectron2"] = StockDatasetMapper(cfg, True)
            runs = {"ours": partial(_map_all, stream.__getitem__, range(images))}
            runs |= {rival: partial(_map_all, mapper, order) for rival, mapper in rivals.items()}
            if model == "YOLOv3" and has_ultralytics():
                dataset = ultralytics_dataset(records, 416, folder)
                runs["ultralytics"] = partial(_map_all, dataset.__getitem__, [i % len(dataset) for i in range(images)])
            table += compare(f"{model}, {images} photographs", _contenders(runs), rounds, images)

            # Here the images are mixed with the large one again.
            mappers = {"ours": DatasetMapper(cfg, True, dataset_dicts=[enlarged]), **rivals}
            runs = {name: partial(_map_all, mapper, [enlarged] * 4) for name, mapper in mappers.items()}
            peaks = [peak_megabytes(run) for run in runs.values()]
            compared = compare(f"{model}, {large[1]} x {large[0]}", _contenders(runs), rounds, 4)
            table += [row | {"MB": peak} for row, peak in zip(compared, peaks, strict=True)]
    batch, device = read_samples(root, 2, size), default_device()
    step = Detector("ours", our_precision(device), build_ours(batch, device)[2]).step
    contender = Contender("ours", partial(step, batch), our_precision(device))
    return pd.DataFrame(table + compare(f"a training step of Faster R-CNN, {device}", [contender], rounds, len(batch)))


def _contenders(runs: Mapping[str, Callable[[], object]]) -> list[Contender]:
    return [Contender(name, run, threads=1) for name, run in runs.items()]


def _map_all(mapper: Callable[[T], object], items: Iterable[T]) -> None:
    for item in items:
        mapper(item)


class ReferenceMapper:
    """The transforms of a recipe as torchvision's reference training for detection has them: each on the whole image.

    Args:
        cfg: the recipe.
        square_size: side of the square of a batch, where the recipe has squares.
    """

    def __init__(self, cfg: CfgNode, square_size: Callable[[int], int]) -> None:
        self.augmentations = v2.Compose(build_augmentations(cfg.INPUT.AUGMENTATIONS, cfg.MODEL.PIXEL_MEAN))
        self.resize = v2.RandomShortestSize(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN)
        self.sanitize = v2.SanitizeBoundingBoxes()
        self.square_size = square_size if cfg.INPUT.SQUARE_SIZES_TRAIN else None
        self.calls = 0

    def __call__(self, record: dict) -> dict:
        """Maps one dataset dict."""
        boxes = torch.tensor([annotation["bbox"] for annotation in record["annotations"]]).reshape(-1, 4)
        sample = {
            "image": tv_tensors.Image(read_image(record["file_name"])),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(record["height"], record["width"])),
            "labels": torch.tensor([annotation["category_id"] for annotation in record["annotations"]]),
        }
        sample = self.augmentations(sample)
        if self.square_size is None:
            return self.sanitize(self.resize(sample))
        self.calls += 1
        side = self.square_size(self.calls)
        sample = v2.RandomShortestSize(side, side)(sample)
        height, width = sample["image"].shape[1:]
        return self.sanitize(v2.Pad([0, 0, side - width, side - height])(sample))


def enlarge(record: dict, path: Path, size: tuple[int, int]) -> dict:
    """Writes the image of a dataset dict at another height and width; returns the dict of that."""
    write_jpeg(v2.functional.resize(read_image(record["file_name"]), list(size), "bicubic"), str(path), quality=95)
    y, x = size[0] / record["height"], size[1] / record["width"]
    annotations = [
        annotation | {"bbox": [corner * scale for corner, scale in zip(annotation["bbox"], (x, y, x, y), strict=True)]}
        for annotation in record["annotations"]
    ]
    return record | {"file_name": str(path), "height": size[0], "width": size[1], "annotations": annotations}


def ultralytics_dataset(records: Sequence[dict], size: int, folder: Path) -> "YOLODataset":
    """Ultralytics' training images of one size with its default augmentations; needs it importable.

    Args:
        records: dataset dicts.
        size: side of the images.
        folder: where links to the images and their labels are put.
    """
    from ultralytics.cfg import get_cfg as get_ultralytics_cfg
    from ultralytics.data import YOLODataset

    for part in ("images", "labels"):
        (folder / part).mkdir()
    for number, record in enumerate(records):
        (folder / "images" / f"{number}{Path(record['file_name']).suffix}").symlink_to(
            Path(record["file_name"]).resolve()
        )
        lines = []
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            box = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            shares = (value / record[side] for value, side in zip(box, ("width", "height") * 2, strict=True))
            lines.append(" ".join(map(str, (annotation["category_id"], *shares))))
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
    names = dict(enumerate(VOC_CLASSES))
    return YOLODataset(
        img_path=str(folder / "images"), imgsz=size, hyp=get_ultralytics_cfg(), data={"names": names}, cache=False
    )


def peak_megabytes(run: Callable[[], object]) -> float:
    """Memory that a run takes at its height beyond what was there before it, in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux

    def measure() -> None:
        torch.set_num_threads(1)  # OpenMP's others were not forked, and would be waited for
        before = peak()
        run()
        sender.send((peak() - before) * 1024 / 1e6)

    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # or the run would make use of memory that others have left
    process = context.Process(target=measure)
    process.start()
    sender.close()  # so that the end of the other process ends the waiting
    peaked = receiver.recv()
    process.join()
    return peaked
