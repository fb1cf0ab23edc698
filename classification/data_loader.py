"""Photographs in batches: decoded once, cut to one size, handed out by the training stream or in order."""

import logging
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from classification.cub import Bird
from classification.recipe import Recipe
from common.cgroups import memory_left
from common.images import read_image, read_size
from common.processes import rank, world_size
from common.runtime import compute_alone, default_device
from common.stream import TrainingStream, build_loader, build_train_loader, worker_count
from common.threads import available_cores

logger = logging.getLogger(__name__)

LONGEST = 16  # aspect ratio beyond which a photograph is cropped to its middle before it is resized


def read_resized(path: Path, side: int) -> Tensor:
    """Decodes a photograph and resizes it to a short side of `side` pixels: uint8, (3, height, width), RGB.

    Raises:
        UserError: the file is no image, or ends too early.
    """
    return resize_short_side(read_image(path), side)


def resize_short_side(pixels: Tensor, side: int) -> Tensor:
    """Resizes an image, uint8 (3, H, W), to a short side of `side` pixels; of a very long one, only its middle."""
    short, long = sorted(pixels.shape[1:])
    if long > LONGEST * short:
        # Resized, the long side would not fit into the memory.
        pixels = functional.center_crop(pixels, [min(length, LONGEST * short) for length in pixels.shape[1:]])
    return functional.resize(pixels, [side], antialias=True)


class BirdDataset(Dataset):
    """Photographs cut to one size, as uint8: everything that must be done image by image.

    What can be done for a whole batch (flip, rotation, normalisation) is left to `engine.BatchAugmentation`. An item is
    a pair of image (uint8, (3, size, size)) and label.

    Args:
        birds: the photographs.
        side: short side to which they are resized before the crop.
        crop: one of torchvision's transforms, from a resized image to a square one.
        cache: decoded images of the same `birds` and `side`; without it each item is decoded when asked for.
    """

    def __init__(self, birds: Sequence[Bird], side: int, crop: nn.Module, cache: "ImageCache | None" = None):
        self.birds, self.side, self.crop, self.cache = birds, side, crop, cache

    def __len__(self) -> int:
        return len(self.birds)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        bird = self.birds[index]
        image = self.cache[index] if self.cache else read_resized(bird.path, self.side)
        return self.crop(image), bird.label


class BirdStream(TrainingStream):
    """The training samples: image, label, and the seed of the image's random draws in `BatchAugmentation`."""

    def __init__(self, recipe: Recipe, birds: Sequence[Bird]) -> None:
        size, side = recipe.image_size, int(recipe.image_size / recipe.crop_pct)
        crop: nn.Module = v2.CenterCrop(size)
        if recipe.train_crop == "random":
            crop = v2.RandomCrop(size)
        elif recipe.train_crop == "random_resized":
            crop = v2.RandomResizedCrop(size, scale=(recipe.crop_scale, 1.0), antialias=True)
        self.dataset = BirdDataset(birds, side, crop, ImageCache.build(birds, side) if recipe.cache else None)
        super().__init__(len(birds), self._sample, recipe.seed, recipe.batch_size, drop_last=True)

    def _sample(self, index: int, position: int) -> tuple[Tensor, int, int]:
        return *self.dataset[index], int(torch.randint(2**63 - 1, ()))


def build_training_loader(recipe: Recipe, stream: BirdStream, iterations: range) -> DataLoader:
    """This process's share of the batches of the given iterations."""
    return build_train_loader(stream, iterations, _workers(recipe.workers, stream.dataset))


def build_test_loader(
    birds: Sequence[Bird], image_size: int, crop_pct: float, batch_size: int, workers: int, cache: bool = False
) -> DataLoader:
    """Centre crops and labels of this process's share of the photographs: each photograph is in one process only.

    Args:
        birds: the photographs.
        image_size: side of what the network sees, in pixels.
        crop_pct: centre crop over short side.
        batch_size: images a batch.
        workers: loading processes.
        cache: keep them decoded, since they are looked at more than once.
    """
    side = int(image_size / crop_pct)
    images = ImageCache.build(birds, side) if cache else None
    dataset = BirdDataset(birds, side, v2.CenterCrop(image_size), images)
    workers = _workers(workers, dataset)
    return build_loader(
        dataset,
        workers,
        batch_size=batch_size,
        sampler=range(rank(), len(birds), world_size()),
        persistent_workers=workers > 0 and cache,
    )


def _workers(wanted: int, dataset: BirdDataset) -> int:
    # On a CPU, cropping a decoded image costs less than handing it from one process to another.
    return 0 if dataset.cache and default_device() == "cpu" else wanted


class ImageCache:
    """Decoded and resized images in one block of memory that all loading and training processes of a machine share.

    Holds uint8 RGB images of a common short side: about 3.1 GB for all of CUB-200-2011 at 256 pixels, 12.4 GB at 512.
    """

    def __init__(self, memory: Tensor, offsets: list[int]):
        self._memory = memory
        self._shapes = memory[: 8 * (len(offsets) - 1)].view(torch.int32).view(-1, 2)
        self._offsets = offsets

    def __getitem__(self, index: int) -> Tensor:
        height, width = self._shapes[index].tolist()
        start = self._offsets[index]
        return self._memory[start : start + 3 * height * width].view(3, height, width)

    @classmethod
    def build(cls, birds: Sequence[Bird], side: int) -> "ImageCache | None":
        """Decodes all images with all cores, or says why not and returns None when they would not fit.

        Among the processes of one machine (torchrun's `LOCAL_RANK`) the first makes the memory and all fill it.

        Args:
            birds: the photographs.
            side: short side in pixels.

        Raises:
            UserError: an image cannot be read.
        """
        with ThreadPoolExecutor(worker_count(available_cores()), initializer=compute_alone) as pool:
            sizes = list(pool.map(partial(_resized_bytes, side), [bird.path for bird in birds]))
            offsets = np.cumsum([8 * len(birds), *sizes]).tolist()
            memory = _shared_memory(offsets[-1])
            if memory is None:
                return None
            cache = cls(memory, offsets)

            def fill(index: int) -> None:
                image = read_resized(birds[index].path, side)
                cache._shapes[index] = torch.tensor(image.shape[1:], dtype=torch.int32)
                cache[index].copy_(image)

            rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            mine = range(rank, len(birds), ranks)
            is_hidden = rank > 0 or None  # None shows it on a terminal alone
            for _ in tqdm(pool.map(fill, mine), "decoding images", len(mine), leave=False, disable=is_hidden):
                pass
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return cache


def _resized_bytes(side: int, path: Path) -> int:
    """Size in memory of an image once resized, from its header alone; orientation does not change it."""
    short, long = sorted(read_size(path))
    return 3 * side * int(side * min(long, LONGEST * short) / short)


def _available_bytes() -> float:
    """Free memory of the machine, or what is left of the limit of this process when that is less."""
    return min(psutil.virtual_memory().available, memory_left())


def _shared_memory(size: int) -> Tensor | None:
    """`size` bytes that forked workers and the other processes of this machine see, or None if they would not fit."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    several = torch.distributed.is_initialized()
    offer = None
    if local_rank == 0:
        available = _available_bytes()
        # A fifth stays free for the network, the workers and everybody else.
        if size > 0.8 * available:
            logger.warning(
                "Decoded images need %.1f GB and %.1f GB of memory is free: they are decoded again in every epoch",
                size / 1e9,
                available / 1e9,
            )
        elif several and not hasattr(os, "memfd_create"):
            logger.warning("Processes can share decoded images only on Linux: they are decoded again in every epoch")
        elif several:
            file = os.memfd_create("birds")
            os.ftruncate(file, size)
            offer = f"/proc/{os.getpid()}/fd/{file}"
        else:
            return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    if not several:
        return None
    offers: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(offers, offer if local_rank == 0 else "")
    if None in offers:  # some machine has none to offer: all do without, since they wait for one another
        if offer:
            os.close(int(offer.rpartition("/")[2]))
        return None
    there = offers[torch.distributed.get_rank() - local_rank]
    assert there, "it is that of the first process of this machine"
    memory = torch.from_file(there, shared=True, size=size, dtype=torch.uint8)
    torch.distributed.barrier()  # nobody closes the file before all have opened it
    if offer:
        os.close(int(offer.rpartition("/")[2]))
    return memory
