"""Loaders of a configuration: the training stream in batches, and test images in the order of their list."""

from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.data import MapDataset
from detectron2.data.samplers import InferenceSampler
from torch.utils.data import DataLoader

from common.processes import ignore_interrupt
from common.stream import TrainingStream, worker_count
from detection.dataset_mapper import DatasetMapper


def build_training_stream(cfg: CfgNode, dataset_dicts: Sequence[dict]) -> TrainingStream:
    """The samples to train on; images of one orientation share a batch, so that little of it is padding.

    Args:
        cfg: a configuration with its lengths in iterations.
        dataset_dicts: Detectron2's dataset dicts, with `height` and `width`.
    """
    mapper = DatasetMapper(cfg, True, dataset_dicts=dataset_dicts)
    size = cfg.SOLVER.IMS_PER_BATCH
    is_portrait = [entry["height"] > entry["width"] for entry in dataset_dicts]
    return TrainingStream(
        len(dataset_dicts), partial(_sample, dataset_dicts, mapper, size), cfg.SEED, size, groups=is_portrait
    )


def build_test_loader(cfg: CfgNode, dataset_dicts: Sequence[dict], with_annotations: bool = False) -> DataLoader:
    """This process's share of images as the model sees them without augmentation, in lists of `TEST.IMS_PER_BATCH`."""
    return DataLoader(
        MapDataset(list(dataset_dicts), DatasetMapper(cfg, with_annotations, augment=False)),
        sampler=InferenceSampler(len(dataset_dicts)),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=worker_count(cfg.DATALOADER.NUM_WORKERS),
        collate_fn=list,
        worker_init_fn=ignore_interrupt,
    )


def _sample(dataset_dicts: Sequence[dict], mapper: DatasetMapper, batch_size: int, index: int, position: int) -> dict:
    return mapper(dataset_dicts[index], position // batch_size)
