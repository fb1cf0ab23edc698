"""The training stream: order, grouping, augmentation, and how processes and workers share it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.stream import TrainingStream, build_train_loader, derive_seed, seeded

IMAGES = 23
PORTRAIT = {index for index in range(IMAGES) if index % 3 == 0}
GROUPS = [index in PORTRAIT for index in range(IMAGES)]


def draw(index: int, position: int) -> dict:
    """Stands for a mapper: random numbers of torch's generator are its augmentation."""
    return {"id": index, "position": position, "noise": torch.rand(3).tolist()}


def make_stream(batch_size: int = 4, seed: int = 0, drop_last: bool = False) -> TrainingStream:
    return TrainingStream(IMAGES, draw, seed, batch_size, groups=GROUPS, drop_last=drop_last)


def batches(iterations: range, workers: int = 0, **options: int) -> list[list[dict]]:
    return list(build_train_loader(make_stream(**options), iterations, workers, collate_fn=list))


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[list[dict]]]]:
    """The batches that each of two processes sees."""

    def of_two(iterations: range, **options: int) -> list[list[list[dict]]]:
        monkeypatch.setenv("WORLD_SIZE", "2")
        found = []
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            found.append(batches(iterations, **options))
        return found

    return of_two


@pytest.mark.parametrize("batch_size", [1, 4, 8, 23, 50])
def test_every_image_once_an_epoch(batch_size: int) -> None:
    stream = make_stream(batch_size)
    ids = [stream[position]["id"] for position in range(3 * IMAGES)]
    epochs = [ids[start : start + IMAGES] for start in range(0, len(ids), IMAGES)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_size", [4, 8])
def test_whole_batches_alone_make_an_epoch_if_the_rest_is_left_out(batch_size: int) -> None:
    stream = make_stream(batch_size, drop_last=True)
    length = IMAGES // batch_size * batch_size
    left_out = set()
    for epoch in range(12):
        ids = {stream[epoch * length + place]["id"] for place in range(length)}
        assert len(ids) == length, "none comes twice"
        left_out |= set(range(IMAGES)) - ids
    assert len(left_out) > IMAGES - length, "not always the same are left out"


def test_batches_hold_one_group() -> None:
    """All but those that an end of an epoch leaves mixed: its last two groups, and the batch that it shares."""
    mixed = sum(len({sample["id"] in PORTRAIT for sample in batch}) == 2 for batch in batches(range(23)))  # 4 epochs
    assert mixed <= 3 * 4
    whole_landscape = (IMAGES - len(PORTRAIT) - 3) // 4
    groups = [{sample["id"] in PORTRAIT for sample in batch} for batch in batches(range(5))]
    assert groups.count({False}) >= whole_landscape


def test_batches_are_shuffled_across_groups() -> None:
    """Or all upright images would come at the end of an epoch."""
    order = TrainingStream(400, draw, 0, 4, groups=[index % 2 for index in range(400)]).order(0)
    upright = order % 2 == 1
    assert 0.3 < upright[:200].mean() < 0.7


@pytest.mark.parametrize("start", [1, 5, 6, 17])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_later_start_goes_on_with_the_same_samples(start: int, drop_last: bool) -> None:
    whole = batches(range(20), drop_last=drop_last)
    assert batches(range(start, 20), drop_last=drop_last) == whole[start:]


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_the_same_samples(shares, drop_last: bool) -> None:
    expected = batches(range(9), drop_last=drop_last)
    first, second = shares(range(9), drop_last=drop_last)
    assert {len(batch) for batch in first + second} == {2}
    assert [one + other for one, other in zip(first, second, strict=True)] == expected


def test_workers_load_the_same_samples() -> None:
    assert batches(range(9), workers=2) == batches(range(9))


def test_positions_draw_for_themselves() -> None:
    stream = make_stream()
    noise = [tuple(stream[position]["noise"]) for position in range(100)]
    assert len(set(noise)) == 100
    assert tuple(stream[7]["noise"]) == noise[7]  # in any order, at any time
    assert tuple(make_stream(seed=1)[7]["noise"]) != noise[7]
    assert [stream[position]["position"] for position in range(30)] == list(range(30))


def test_another_seed_is_another_order() -> None:
    orders = {tuple(make_stream(seed=seed).order(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_model_draws_the_same_whether_a_loader_starts_or_goes_on() -> None:
    """A restart starts a loader in the middle of the training: that must not move torch's own generator."""
    torch.manual_seed(0)
    expected = torch.rand(4)
    for workers in (0, 1):
        torch.manual_seed(0)
        next(iter(build_train_loader(make_stream(), range(3), workers, collate_fn=list)))
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


def test_seeds_depend_on_every_part_and_on_the_order() -> None:
    seeds = {derive_seed(*key) for key in [(0, 1), (1, 0), (0, 1, 0), (1, 1), (0,), (1,), ("1",), (11,)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)
