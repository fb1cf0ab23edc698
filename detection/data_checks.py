"""Checks of the data that a configuration names: objects, pictures, classes."""

import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from common.errors import UserError
from common.images import refuse_odd
from detection.voc_pictures import cached_headers, find_odd

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, keys: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Refuses datasets that the data root does not give, or that hold nothing to learn or to find.

    Args:
        cfg: the configuration.
        keys: those of its `DATASETS` that are used.

    Raises:
        UserError: a name is unknown, there is none, there is no object to train on, or a test set has none that counts.
    """
    known = [name for name in DatasetCatalog.list() if MetadataCatalog.get(name).get("evaluator_type") == "voc"]
    for key in keys:
        names = getattr(cfg.DATASETS, key)
        if not names or not set(names) <= set(known):
            raise UserError(f"DATASETS.{key} {names}: expected one or more of {', '.join(known)}")
        if key == "TRAIN" and not any(_has_object(name, difficult_ones=True) for name in names):
            raise UserError(
                f"{cfg.DATASETS.ROOT}: {', '.join(names)} has no object to learn from; annotate its images or name "
                "another split with DATASETS.TRAIN"
            )
        for name in names if key == "TEST" else ():
            if not _has_object(name, difficult_ones=False):
                raise UserError(
                    f"{cfg.DATASETS.ROOT}: {name} has no object to be found, difficult ones left out, so that no AP "
                    "can be computed; annotate its images or name other splits with DATASETS.TEST"
                )


def _has_object(dataset: str, difficult_ones: bool) -> bool:
    annotations = (annotation for record in DatasetCatalog.get(dataset) for annotation in record["annotations"])
    return any(difficult_ones or not annotation["difficult"] for annotation in annotations)


def check_pictures(cfg: CfgNode, names: Sequence[str]) -> None:
    """Refuses datasets with pictures that cannot be read or are of another size than their annotations say.

    Warns of pictures whose size does not tell whether EXIF applies, where `INPUT.EXIF` is "auto".

    Raises:
        UserError: there are such pictures; it names the first few.
    """
    for name in names:
        records, metadata = DatasetCatalog.get(name), MetadataCatalog.get(name)
        files = [record["file_name"] for record in records]
        sizes = [(record["height"], record["width"]) for record in records]
        headers = cached_headers(Path(metadata.dirname), metadata.split, files)
        odd, undecided = find_odd(files, sizes, headers)
        refuse_odd(odd)
        if undecided and cfg.INPUT.EXIF == "auto":
            logger.warning(
                "%s: EXIF turns or mirrors %d images without a trace in their size, %s first: their boxes are taken to "
                "be drawn on what is then seen; EXIF=stored if on the pixels as they are stored",
                name, len(undecided), undecided[0],
            )  # fmt: skip


def check_classes(cfg: CfgNode, source: object) -> None:
    """Refuses data whose classes are not those that `source`, weights or a run, was made with.

    Raises:
        UserError: they differ.
    """
    name = cfg.DATASETS.TEST[0]  # the datasets of a root have the same classes
    known, classes = cfg.MODEL.CLASSES, list(MetadataCatalog.get(name).thing_classes)
    if classes != known:
        lacking = [class_name for class_name in known if class_name not in classes]
        further = [class_name for class_name in classes if class_name not in known]
        parts = [f"{word} {', '.join(some[:3])}" for word, some in (("not", lacking), ("but", further)) if some]
        raise UserError(
            f"{source}: knows {len(known)} classes, {name} in {cfg.DATASETS.ROOT} has {len(classes)}, "
            f"{' '.join(parts) or 'the same in another order'}; give the data that the weights were trained for"
        )
