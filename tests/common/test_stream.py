"""The training stream: order, grouping, augmentation, and how processes and workers share it."""

import numpy as np
import pytest
import torch

from detection.data_loader import TrainingStream, build_train_loader, seeded

PORTRAIT = {index for index in range(23) if index % 3 == 0}
DATASET = [{"id": index, "height": 4 if index in PORTRAIT else 2, "width": 3} for index in range(23)]


def draw(entry: dict, batch: int) -> dict:
    """Stands for the mapper: random numbers of torch's generator are its augmentation."""
    return {"id": entry["id"], "batch": batch, "noise": torch.rand(3).tolist()}


def make_stream(batch_size: int = 4, seed: int = 0) -> TrainingStream:
    return TrainingStream(DATASET, draw, seed, batch_size)


def batches(iterations: range, rank: int = 0, world_size: int = 1, workers: int = 0, batch_size: int = 4) -> list:
    return list(build_train_loader(make_stream(batch_size), iterations, rank, world_size, workers))


@pytest.mark.parametrize("batch_size", [1, 4, 8, 23, 50])
def test_every_image_once_an_epoch(batch_size: int) -> None:
    stream = make_stream(batch_size)
    ids = [stream[position]["id"] for position in range(3 * len(DATASET))]
    epochs = [ids[start : start + len(DATASET)] for start in range(0, len(ids), len(DATASET))]
    assert all(sorted(epoch) == list(range(len(DATASET))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_hold_one_orientation() -> None:
    """All but those that an end of an epoch leaves mixed: its last two groups, and the batch that it shares."""
    mixed = sum(len({sample["id"] in PORTRAIT for sample in batch}) == 2 for batch in batches(range(23)))  # 4 epochs
    assert mixed <= 3 * 4
    whole_landscape = (len(DATASET) - len(PORTRAIT) - 3) // 4
    orientations = [{sample["id"] in PORTRAIT for sample in batch} for batch in batches(range(5))]
    assert orientations.count({False}) >= whole_landscape


def test_batches_are_shuffled_across_orientations() -> None:
    """Or all upright images would come at the end of an epoch."""
    dataset = [{"id": index, "height": 1 + index % 2, "width": 1.5} for index in range(400)]
    order = TrainingStream(dataset, draw, 0, 4).order(0)
    upright = order % 2 == 1
    assert 0.3 < upright[:200].mean() < 0.7


@pytest.mark.parametrize("start", [1, 5, 6, 17])
def test_a_later_start_goes_on_with_the_same_samples(start: int) -> None:
    assert batches(range(start, 20)) == batches(range(20))[start:]


def test_workers_and_ranks_share_the_same_samples() -> None:
    expected = batches(range(9))
    assert batches(range(9), workers=2) == expected
    shares = [batches(range(9), rank, 2) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == expected


def test_positions_draw_for_themselves() -> None:
    stream = make_stream()
    noise = [tuple(stream[position]["noise"]) for position in range(100)]
    assert len(set(noise)) == 100
    assert tuple(stream[7]["noise"]) == noise[7]  # in any order, at any time
    assert tuple(make_stream(seed=1)[7]["noise"]) != noise[7]
    assert [stream[position]["batch"] for position in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_the_model_draws_the_same_whether_a_loader_starts_or_goes_on() -> None:
    """A restart starts a loader in the middle of the training: that must not move torch's own generator."""
    torch.manual_seed(0)
    expected = torch.rand(4)
    for workers in (0, 1):
        torch.manual_seed(0)
        next(iter(build_train_loader(make_stream(), range(3), 0, 1, workers)))
        assert torch.equal(torch.rand(4), expected)


def test_seeded_restores_the_generator_even_after_an_error() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), seeded(1, 2):
        torch.rand(5)
        raise ZeroDivisionError
    assert torch.equal(torch.rand(2), expected)
    with seeded(1, 2):
        first = torch.rand(3)
    with seeded(12):
        second = torch.rand(3)
    assert not np.allclose(first, second)
