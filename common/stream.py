"""The training stream: the sample at position p depends on the seed and p alone.

It depends neither on the number of workers or processes nor on restarts, so a resumed run sees exactly what the run
that was never stopped would have seen. Position p = iteration x batch + place in the batch.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils._pytree import tree_map_only_
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from common.processes import ignore_interrupt, rank, world_size
from common.runtime import default_device
from common.threads import available_cores


def derive_seed(*key: int | str) -> int:
    """A seed below 2^64 that depends on all of `key` and its order, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seeds torch's generator on the CPU by `key` inside the block and restores it afterwards."""
    generator = torch.default_generator  # torch.manual_seed takes ten times as long, for all kinds of devices
    state = generator.get_state()
    try:
        generator.manual_seed(derive_seed(*key))
        yield
    finally:
        generator.set_state(state)


class TrainingStream(Dataset):
    """An endless sequence of training samples, indexed by position.

    Every image comes once an epoch, with `drop_last` at most once, in a new order. Images of one group are put into
    batches together.

    Args:
        num_images: images to train on.
        sample: makes the sample of an image (its index) at a position; called with torch's generator seeded.
        seed: of the order and of all that `sample` draws.
        batch_size: images in a batch over all processes.
        groups: for each image a number; those of one group are batched together, such as those of one orientation.
        drop_last: leave out an incomplete last batch, so that every epoch is a whole number of batches.
    """

    def __init__(
        self,
        num_images: int,
        sample: Callable[[int, int], Any],
        seed: int,
        batch_size: int,
        groups: Sequence[int] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.sample, self.seed, self.batch_size = sample, seed, batch_size
        self.groups = np.zeros(num_images, np.int64) if groups is None else np.asarray(groups)
        self.epoch_length = num_images // batch_size * batch_size if drop_last else num_images
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of all images in the order of this epoch, shape (number of images,)."""
        if epoch == self._epoch:
            return self._order
        rng = np.random.default_rng((self.seed, epoch))
        indices = rng.permutation(len(self.groups))
        # The epoch opens inside the batch that the last epoch left unfinished.
        head = min(-epoch * self.epoch_length % self.batch_size, len(indices))
        body = indices[head:]
        batches, rest = [], []
        for group in np.unique(self.groups):
            members = body[self.groups[body] == group]
            whole = len(members) // self.batch_size * self.batch_size
            batches.extend(members[:whole].reshape(-1, self.batch_size))
            rest.append(members[whole:])
        rng.shuffle(batches)
        self._epoch, self._order = epoch, np.concatenate([indices[:head], *batches, *rest])
        return self._order

    def __getitem__(self, position: int) -> Any:
        """The sample at `position`, 0 or more."""
        epoch, place = divmod(position, self.epoch_length)
        index = int(self.order(epoch)[place])
        with seeded(self.seed, position):
            return self.sample(index, position)


def build_train_loader(
    stream: TrainingStream, iterations: range, num_workers: int, collate_fn: Callable = default_collate, **options: Any
) -> DataLoader:
    """This process's share of the batches of the given iterations; options are those of `build_loader`."""
    share = stream.batch_size // world_size()
    starts = (iteration * stream.batch_size + rank() * share for iteration in iterations)
    return build_loader(
        stream,
        num_workers,
        collate_fn,
        batch_sampler=[range(start, start + share) for start in starts],
        generator=torch.Generator(),  # or the first batch after a restart would draw from the model's generator
        **options,
    )


def build_loader(
    dataset: Dataset, num_workers: int, collate_fn: Callable = default_collate, **options: Any
) -> DataLoader:
    """A loader whose processes leave Ctrl-C to this one, keep to one core, and cannot fail unheard.

    Args:
        dataset: gives the samples.
        num_workers: loading processes that are wanted; see `worker_count`.
        collate_fn: makes a batch of samples: tensors in lists, tuples and dicts.
        options: of torch's `DataLoader`; memory is pinned for the default device unless they say otherwise.
    """
    options.setdefault("pin_memory", default_device() == "cuda")
    return DataLoader(
        dataset,
        num_workers=worker_count(num_workers),
        collate_fn=partial(_collate_for_sending, collate_fn),
        worker_init_fn=_prepare_worker,
        **options,
    )


def _prepare_worker(worker: int) -> None:
    ignore_interrupt()
    cv2.setNumThreads(0)


def _collate_for_sending(collate_fn: Callable, samples: Sequence) -> Any:
    """A batch, in a loading process already in the memory that is shared with the training process.

    If the sending thread moved it there, a batch too large for /dev/shm would be dropped, and the training process
    would wait for it forever.
    """
    batch = collate_fn(samples)
    if get_worker_info() is not None:
        tree_map_only_(torch.Tensor, torch.Tensor.share_memory_, batch)
    return batch


def worker_count(wanted: int) -> int:
    """Loading processes or threads of each training process: as many as wanted, at most its share of the cores here."""
    return min(wanted, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
