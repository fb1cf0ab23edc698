"""Photographs on their way into batches: decoded, kept in memory, cut, and handed out by the training stream."""

import os
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from classification import data_loader
from classification.cub import Bird, read_cub
from classification.data_loader import (
    BirdDataset,
    BirdStream,
    ImageCache,
    build_test_loader,
    build_training_loader,
    read_resized,
)
from classification.recipe import Recipe
from common.errors import UserError
from tests.classification.runs import assert_same
from tests.processes import together


def gradient() -> Image.Image:
    columns, rows = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 90)], 2).astype(np.uint8))


def test_an_image_is_shrunk_without_aliases(tmp_path):
    """A third of a one-pixel checkerboard is grey, where every third pixel alone would be a checkerboard again."""
    squares = 255 * (np.indices((60, 90)).sum(0) % 2)
    Image.fromarray(squares.astype(np.uint8)).save(tmp_path / "squares.png")
    image = read_resized(tmp_path / "squares.png", side=20)
    assert image.shape == (3, 20, 30)
    assert (image.int() - 127).abs().max() <= 3


@pytest.mark.parametrize("kind", ["cut short", "not an image"])
def test_an_unreadable_image_is_named_by_the_cache(tmp_path, kind):
    path = tmp_path / "broken.jpg"
    gradient().save(path)
    path.write_bytes({"cut short": path.read_bytes()[:400], "not an image": b"no image"}[kind])
    with pytest.raises(UserError, match=r"broken\.jpg: cannot be read as an image"):
        ImageCache.build([Bird(path, 0)], side=20)


def test_the_cache_holds_what_decoding_gives_and_other_processes_see_it(tiny_root, tmp_path):
    birds = read_cub(tiny_root).train[:6]
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(tmp_path / "turned.jpg", exif=exif)
    birds.append(Bird(tmp_path / "turned.jpg", 0))
    cache = ImageCache.build(birds, side=33)
    for index, bird in enumerate(birds):
        assert torch.equal(cache[index], read_resized(bird.path, 33))
    child = get_context("fork").Process(target=lambda: cache[0].fill_(7))
    child.start()
    child.join()
    assert (cache[0] == 7).all()


def test_without_memory_there_is_no_cache_and_one_line_says_so(tiny_root, monkeypatch, caplog):
    monkeypatch.setattr(data_loader, "_available_bytes", lambda: 1000)
    birds = read_cub(tiny_root).train
    assert ImageCache.build(birds, side=40) is None
    assert "decoded again in every epoch" in caplog.text
    image, label = BirdDataset(birds, 40, v2.CenterCrop(32))[3]
    assert image.shape == (3, 32, 32)
    assert label == birds[3].label


def build_as_machines(root):
    """Whether this process, the only one of its machine, has a cache; the second machine has no memory."""
    machine = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    if machine == 1:
        data_loader._available_bytes = lambda: 1000
    return ImageCache.build(read_cub(root).train, side=40) is not None


def test_machines_of_which_one_has_no_memory_all_do_without_a_cache(kept_root):
    assert together(2, build_as_machines, kept_root) == [False, False]


RECIPE = Recipe(image_size=32, crop_pct=0.8, train_crop="random_resized", batch_size=4, seed=3)


def stream_of(root, seed=3):
    """The training stream without the last seven birds: 23 images, of which 20 make the batches of an epoch."""
    return BirdStream(replace(RECIPE, seed=seed), read_cub(root).train[:23])


def test_an_epoch_is_whole_batches_of_different_images_and_the_next_another(tiny_root):
    stream = stream_of(tiny_root)
    assert stream.epoch_length == 20
    first, second = ([stream.order(epoch)[place] for place in range(20)] for epoch in range(2))
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert first != [stream_of(tiny_root, seed=4).order(0)[place] for place in range(20)]
    seeds = [stream[position][2] for position in range(40)]
    assert len(set(seeds)) == 40


def test_the_stream_goes_on_anywhere_and_is_shared_by_workers_and_processes(tiny_root, monkeypatch):
    def batches(start, workers=0):
        recipe = replace(RECIPE, workers=workers, cache=not workers)
        stream = BirdStream(recipe, read_cub(tiny_root).train[:23])
        return list(build_training_loader(recipe, stream, range(start, 12)))

    whole = batches(0)
    assert len(whole) == 12
    assert_same(batches(7), whole[7:])
    assert_same(batches(7, workers=2), whole[7:])
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        shares.append(batches(7))
    halves = [[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in zip(*shares, strict=True)]
    assert_same(halves, whole[7:])


def test_what_is_cut_out_depends_on_the_position_alone(tiny_root):
    stream = stream_of(tiny_root)
    before = torch.random.get_rng_state()
    first = stream[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = stream_of(tiny_root)[0]
    assert torch.equal(again[0], first[0])
    assert again[1:] == first[1:]
    later = next(position for position in range(20, 40) if stream.order(1)[position - 20] == stream.order(0)[0])
    assert not torch.equal(stream[later][0], first[0])


@pytest.fixture
def photograph(tmp_path) -> Bird:
    """40 x 40 pixels: six times their row is their red, six times their column their green."""
    rows, columns = np.indices((40, 40))
    pixels = np.stack([6 * rows, 6 * columns, np.full_like(rows, 90)], 2)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photograph.png")
    return Bird(tmp_path / "photograph.png", 0)


def windows(bird, **settings) -> torch.Tensor:
    """What is cut out in a hundred places of the stream, for a network that sees 32 of 40 pixels."""
    stream = BirdStream(Recipe(image_size=32, crop_pct=0.8, batch_size=4, **settings), [bird] * 4)
    return torch.stack([stream[position][0] for position in range(100)])


def test_the_centre_is_cut_out_of_an_image_as_large_as_the_share_says(photograph):
    """32 pixels are 0.8 of 40, so that nothing is resized."""
    centre = read_resized(photograph.path, 40)[:, 4:36, 4:36]
    assert all(torch.equal(window, centre) for window in windows(photograph, train_crop="center"))
    ((images, _),) = build_test_loader([photograph], image_size=32, crop_pct=0.8, batch_size=1, workers=0)
    assert torch.equal(images[0], centre)


def test_a_random_crop_is_a_window_anywhere_in_the_resized_image(photograph):
    whole = read_resized(photograph.path, 40)
    corners = []
    for window in windows(photograph, train_crop="random"):
        top, left = (window[:2, 0, 0] // 6).tolist()
        assert torch.equal(window, whole[:, top : top + 32, left : left + 32])
        corners.append((top, left))
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(9))
    assert len(set(corners)) > 50


@pytest.mark.parametrize("smallest", [0.3, 0.7])
def test_a_resized_crop_keeps_the_share_of_the_area_that_is_asked_for(photograph, smallest):
    found = windows(photograph, train_crop="random_resized", crop_scale=smallest).float()
    assert found.shape == (100, 3, 32, 32)
    # From the first to the last of 32 pixels it is 31 / 32 of a side, in steps of 6 a pixel.
    heights = (found[:, 0, -1].mean(1) - found[:, 0, 0].mean(1)) / 6 * 32 / 31
    widths = (found[:, 1, :, -1].mean(1) - found[:, 1, :, 0].mean(1)) / 6 * 32 / 31
    shares = heights * widths / 40**2
    assert smallest - 0.05 < shares.min() < smallest + 0.1
    assert 0.9 < shares.max() < 1.05
