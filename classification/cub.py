"""CUB-200-2011: its index files, checked against one another, and its images, decoded once.

The official layout, 200 classes, 5,994 training and 5,794 test images:

    CUB_200_2011/
        classes.txt               1 001.Black_footed_Albatross
        images.txt                1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg
        image_class_labels.txt    1 1
        train_test_split.txt      1 0          (1: training, 0: test)
        images/001.Black_footed_Albatross/...

Any other folder in this layout is read as well, with as many classes as it has.

Source: C. Wah, S. Branson, P. Welinder, P. Perona, S. Belongie. The Caltech-UCSD Birds-200-2011 Dataset. 2011.
"""

import logging
import mmap
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from common.errors import UserError

logger = logging.getLogger(__name__)

FOLDER = "CUB_200_2011"


class Bird(NamedTuple):
    """One photograph: where it lies and its class, counted from 0."""

    path: Path
    label: int


@dataclass(frozen=True)
class Cub:
    """The data set: class names without their numbers, in the order of the labels, and the official split."""

    class_names: list[str]
    train: list[Bird]
    test: list[Bird]


def read_cub(root: Path) -> Cub:
    """Reads the four index files under `root/CUB_200_2011`.

    Raises:
        UserError: a file is missing or malformed, the files disagree, an image is missing, or a split is empty.
    """
    folder = root / FOLDER
    classes = _read_index(folder / "classes.txt")
    images = _read_index(folder / "images.txt")
    labels = _read_index(folder / "image_class_labels.txt")
    split = _read_index(folder / "train_test_split.txt")

    if sorted(classes, key=int) != [str(number) for number in range(1, len(classes) + 1)]:
        raise UserError(f"{folder / 'classes.txt'}: expected the class numbers 1 to {len(classes)}, each once")
    for name, index in (("image_class_labels.txt", labels), ("train_test_split.txt", split)):
        if unmatched := images.keys() ^ index.keys():
            raise UserError(
                f"{folder / name}: {len(index)} images, but images.txt has {len(images)}; image {min(unmatched)} is in"
                " only one of them: unpack CUB_200_2011.tgz again"
            )

    birds: dict[str, list[Bird]] = {"0": [], "1": []}
    for image, name in images.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"{folder / 'images.txt'}: image {image} is {name}: expected a path inside images/")
        if labels[image] not in classes:
            raise UserError(
                f"{folder / 'image_class_labels.txt'}: image {image} has class {labels[image]}, expected one of the"
                f" {len(classes)} in classes.txt"
            )
        if relative.parent.name != classes[labels[image]]:
            raise UserError(
                f"{folder / 'image_class_labels.txt'}: image {image} ({name}) has class {classes[labels[image]]}:"
                " the index files are not of one edition; unpack CUB_200_2011.tgz again"
            )
        if split[image] not in birds:
            raise UserError(
                f"{folder / 'train_test_split.txt'}: image {image} has {split[image]!r},"
                " expected 1 (training) or 0 (test)"
            )
        birds[split[image]].append(Bird(folder / "images" / relative, int(labels[image]) - 1))

    for part, flag in (("training", "1"), ("test", "0")):
        if not birds[flag]:
            raise UserError(
                f"{folder / 'train_test_split.txt'}: no {part} images; expected some lines ending in {flag}"
            )
    missing = [bird.path for flag in "10" for bird in birds[flag] if not bird.path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such image ({len(missing)} of {len(images)} missing); images.txt names it:"
            " unpack CUB_200_2011.tgz again"
        )
    names = [classes[str(number)].partition(".")[2] or classes[str(number)] for number in range(1, len(classes) + 1)]
    return Cub([name.replace("_", " ") for name in names], birds["1"], birds["0"])


def _read_index(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected CUB-200-2011 in its official layout: give DATA=<folder of {FOLDER}>"
        )
    index: dict[str, str] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not key.isdecimal() or not value or key in index:
            raise UserError(f"{path}: line {number} is {line[:60]!r}, expected a new number and a value")
        index[key] = value.strip()
    return index


def hold_out(birds: Sequence[Bird], share: float, seed: int) -> tuple[list[Bird], list[Bird]]:
    """Splits images into a part to learn from and a part to choose on, class by class.

    Every class with two or more images gives `share` of them, at least one and not all, drawn by `seed`.

    Returns:
        The two parts, each in the order of `birds`.
    """
    by_class = defaultdict(list)
    for index, bird in enumerate(birds):
        by_class[bird.label].append(index)
    generator = np.random.default_rng(seed)
    held: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.update(generator.permutation(members)[:count].tolist())
    return [bird for i, bird in enumerate(birds) if i not in held], [birds[i] for i in sorted(held)]


def read_image(path: Path, side: int) -> Tensor:
    """Decodes one photograph, upright (EXIF) and in RGB whatever its colour space, and resizes it.

    Args:
        path: a JPEG, PNG, WebP or GIF file.
        side: short side of the result in pixels.

    Returns:
        uint8, (3, height, width), RGB.

    Raises:
        UserError: the file is not such an image, or ends too early.
    """
    try:
        image = decode_image(str(path), ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rpartition(", ")[2]
        raise UserError(
            f"{path}: unreadable image ({reason}); expected a whole JPEG or PNG: replace the file"
        ) from None
    if image.ndim == 4:  # an animation: its first picture
        image = image[0]
    return functional.resize(functional.to_dtype(image, torch.uint8, scale=True), [side], antialias=True)


class BirdDataset(Dataset):
    """Photographs cut to one size, as uint8: everything that must be done image by image.

    What can be done for a whole batch (flip, rotation, normalisation) is left to `engine.BatchAugmentation`.

    An item is asked for as `(index, seed)`: the crop depends on the seed alone, not on the process that makes it.
    It is a triple of image (uint8, (3, size, size)), label and that seed.

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

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = key
        image = self.cache[index] if self.cache else read_image(self.birds[index].path, self.side)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.crop(image), self.birds[index].label, seed


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
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(lambda bird: _resized_bytes(bird.path, side), birds))
            offsets = np.cumsum([8 * len(birds), *sizes]).tolist()
            memory = _shared_memory(offsets[-1])
            if memory is None:
                return None
            cache = cls(memory, offsets)

            def fill(index: int) -> None:
                image = read_image(birds[index].path, side)
                cache._shapes[index] = torch.tensor(image.shape[1:], dtype=torch.int32)
                cache[index].copy_(image)

            rank, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            mine = range(rank, len(birds), ranks)
            shown = rank == 0 and sys.stderr.isatty()
            for _ in tqdm(pool.map(fill, mine), "decoding images", len(mine), leave=False, disable=not shown):
                pass
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return cache


def _resized_bytes(path: Path, side: int) -> int:
    """Size in memory of an image once resized, from its header alone; orientation does not change it."""
    try:
        with Image.open(path) as image:
            short, long = sorted(image.size)
    except OSError:
        raise UserError(f"{path}: unreadable image; expected a whole JPEG or PNG: replace the file") from None
    return 3 * side * int(side * long / short)


def _available_bytes() -> int:
    """Free memory of the machine, or of the container when that is less."""
    available = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        available = min(available, int(text) - int(used.read_text()))
    return available


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
        elif several:
            file = os.memfd_create("birds")
            os.ftruncate(file, size)
            offer = f"/proc/{os.getpid()}/fd/{file}"
        else:
            return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    if not several:
        return None
    offers: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(offers, offer)
    first_here = torch.distributed.get_rank() - local_rank
    if offers[first_here] is None:
        return None
    memory = torch.from_file(offers[first_here], shared=True, size=size, dtype=torch.uint8)
    torch.distributed.barrier()  # nobody closes the file before all have opened it
    if offer:
        os.close(int(offer.rpartition("/")[2]))
    return memory
