"""The training stream: the sample at position p depends on the seed and p alone.

It depends neither on the number of workers nor on restarts, so a resumed run sees exactly what the run that was never
stopped would have seen. Position p = iteration x batch + place in the batch.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from torch.utils.data import DataLoader, Dataset


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seeds torch's generator on the CPU by `key` inside the block and restores it afterwards."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.default_generator  # torch.manual_seed takes ten times as long, for all kinds of devices
    state = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(digest, "little"))
        yield
    finally:
        generator.set_state(state)


class TrainingStream(Dataset):
    """An endless sequence of mapped training samples, indexed by position.

    Every image comes once an epoch. Within an epoch, images of one orientation are put into batches together, as
    Detectron2's aspect-ratio grouping does, so that little of a batch is padding.

    Args:
        dataset_dicts: Detectron2's dataset dicts, with `height` and `width`.
        mapper: makes a model's input of a dataset dict and the batch's number; called with torch's generator seeded.
        seed: seed of order and augmentation.
        batch_size: images in a batch over all processes.
    """

    def __init__(
        self, dataset_dicts: Sequence[dict], mapper: Callable[[dict, int], dict], seed: int, batch_size: int
    ) -> None:
        self.dataset_dicts = dataset_dicts
        self.mapper = mapper
        self.seed = seed
        self.batch_size = batch_size
        self._is_portrait = np.array([entry["height"] > entry["width"] for entry in dataset_dicts])
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of all images in the order of this epoch, shape (number of images,)."""
        if epoch == self._epoch:
            return self._order
        rng = np.random.default_rng((self.seed, epoch))
        indices = rng.permutation(len(self.dataset_dicts))
        # The epoch opens inside the batch that the last epoch left unfinished.
        head = min(-epoch * len(indices) % self.batch_size, len(indices))
        body = indices[head:]
        batches, rest = [], []
        for group in (body[~self._is_portrait[body]], body[self._is_portrait[body]]):
            whole = len(group) // self.batch_size * self.batch_size
            batches.extend(group[:whole].reshape(-1, self.batch_size))
            rest.append(group[whole:])
        rng.shuffle(batches)
        self._epoch, self._order = epoch, np.concatenate([indices[:head], *batches, *rest])
        return self._order

    def __getitem__(self, position: int) -> dict:
        """The sample at `position`, 0 or more."""
        epoch, place = divmod(position, len(self.dataset_dicts))
        entry = self.dataset_dicts[self.order(epoch)[place]]
        with seeded(self.seed, position):
            return self.mapper(entry, position // self.batch_size)


def worker_count(cfg: CfgNode) -> int:
    """Loading processes of each training process: what the configuration asks for, at most one a core."""
    return min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)


def build_train_loader(
    stream: TrainingStream, iterations: range, rank: int, world_size: int, num_workers: int
) -> DataLoader:
    """Batches of one process as lists of samples, for the given iterations."""
    share = stream.batch_size // world_size
    batches = [
        range(start, start + share)
        for start in (iteration * stream.batch_size + rank * share for iteration in iterations)
    ]
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or the first batch after a restart would draw from the model's generator
    )


def _start_worker(_: int) -> None:
    """A worker has one core, for OpenCV as for torch; and OpenCV's threads do not survive a fork."""
    cv2.setNumThreads(0)
