"""Loaders of a configuration: the training stream in batches, and test images in the order of their list.

What a loading process hands over is a few tensors a batch, however many images it has: every tensor costs an open file
there, and a copy to the GPU.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MapDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.utils.data import DataLoader

from common.stream import TrainingStream, build_loader, build_train_loader
from common.threads import available_cores
from detection.config import at_least_one
from detection.dataset_mapper import DatasetMapper
from detection.meta_arch import padded_size

PADDING = 32  # both detectors pad to multiples of it; with another value they would split a batch into groups


class BatchLoader:
    """Batches of a loader as lists of Detectron2's samples, their tensors on the device of the model.

    Args:
        loader: gives what `pack` makes of a batch.
        device: of the model.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        for rest, tensors in self.loader:
            yield unpack(rest, tensors, self.device)


def pack(samples: Sequence[dict]) -> tuple[list[dict], dict[str, Tensor]]:
    """A batch as few tensors; a `collate_fn`.

    Args:
        samples: with `image` (uint8, (3, H, W)) and, all or none of them, `instances` with `gt_boxes` and other fields.

    Returns:
        The samples, with the image replaced by its shape and the instances by their number; and tensors by name:
        `image`, all pixels one after the other, and each field of all instances.
    """
    tensors = {"image": torch.cat([sample["image"].flatten() for sample in samples])}
    if all("instances" in sample for sample in samples):
        fields = [sample["instances"].get_fields() for sample in samples]
        for name in fields[0]:
            values = [field[name].tensor if name == "gt_boxes" else field[name] for field in fields]
            tensors[name] = torch.cat(values)
    rest = [
        {
            **sample,
            "image": tuple(sample["image"].shape),
            **({"instances": len(sample["instances"])} if "instances" in sample else {}),
        }
        for sample in samples
    ]
    return rest, tensors


def unpack(rest: Sequence[dict], tensors: dict[str, Tensor], device: torch.device) -> list[dict]:
    """Undoes `pack`, on a device; the samples share the memory of their batch."""
    tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    shapes = [sample["image"] for sample in rest]
    pixels = tensors.pop("image").split([int(np.prod(shape)) for shape in shapes])
    samples = [
        {**sample, "image": image.view(shape)} for sample, image, shape in zip(rest, pixels, shapes, strict=True)
    ]
    if tensors:
        ends = [0, *np.cumsum([sample["instances"] for sample in rest]).tolist()]
        for sample, (start, end) in zip(samples, pairwise(ends), strict=True):
            fields = {name: tensor[start:end] for name, tensor in tensors.items()}
            fields["gt_boxes"] = Boxes(fields["gt_boxes"])
            sample["instances"] = Instances(tuple(sample["image"].shape[1:]), **fields)
    return samples


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


def build_training_loader(cfg: CfgNode, dataset_dicts: Sequence[dict], iterations: range) -> BatchLoader:
    """This process's share of the batches of the given iterations."""
    stream, device = build_training_stream(cfg, dataset_dicts), torch.device(cfg.MODEL.DEVICE)
    loader = build_train_loader(stream, iterations, cfg.DATALOADER.NUM_WORKERS, pack, pin_memory=device.type == "cuda")
    return BatchLoader(loader, device)


def build_test_loader(cfg: CfgNode, dataset_dicts: Sequence[dict], with_annotations: bool = False) -> BatchLoader:
    """This process's share of images as the model sees them without augmentation, in lists of `TEST.IMS_PER_BATCH`.

    Without annotations, for inference, images that are padded to the same size are in a list together.

    Args:
        cfg: the configuration.
        dataset_dicts: Detectron2's dataset dicts, with `height` and `width`.
        with_annotations: whether the samples have `instances`; the lists are then in the order of the images.

    Raises:
        UserError: a size or `TEST.IMS_PER_BATCH` is below 1.
    """
    mapper = DatasetMapper(cfg, False, with_annotations=with_annotations)
    share = list(InferenceSampler(len(dataset_dicts)))
    sizes = [(0, 0)] * len(share)
    if not with_annotations:
        sizes = [mapper.test_size(dataset_dicts[index]["height"], dataset_dicts[index]["width"]) for index in share]
    workers, device = cfg.DATALOADER.NUM_WORKERS, torch.device(cfg.MODEL.DEVICE)
    if device.type == "cpu":
        # There the network itself keeps all cores busy, and waits for whichever of them a loading process is on: on two
        # cores that takes a fifth more time than reading the images in between.
        workers = min(workers, available_cores() // 4)
    loader = build_loader(
        MapDataset(list(dataset_dicts), mapper),
        workers,
        pack,
        batch_sampler=batches_of_one_size(share, sizes, at_least_one(cfg, "TEST.IMS_PER_BATCH")),
        pin_memory=device.type == "cuda",
    )
    return BatchLoader(loader, device)


def batches_of_one_size(indices: Sequence[int], sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Groups indices into lists of at most `batch_size` whose images have the same padded size.

    Args:
        indices: of the images.
        sizes: height and width of each.
        batch_size: length of a list.

    Returns:
        The lists, the largest images first, and within one size in the order given.
    """
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, size in zip(indices, sizes, strict=True):
        by_size[padded_size(size, PADDING)].append(index)
    largest_first = sorted(by_size.items(), key=lambda item: item[0][0] * item[0][1], reverse=True)
    return [
        members[start : start + batch_size]
        for _, members in largest_first
        for start in range(0, len(members), batch_size)
    ]


def _sample(dataset_dicts: Sequence[dict], mapper: DatasetMapper, batch_size: int, index: int, position: int) -> dict:
    return mapper(dataset_dicts[index], position // batch_size)
