"""Painting: how far files are shrunk on reading, and what is read at all."""

import numpy as np
import pytest
import torch

from detection.scene import open_scene, paint


@pytest.mark.parametrize(
    ("view", "size", "expected"),
    [
        ((0, 0, 800, 600), (600, 800), 1),
        ((0, 0, 800, 600), (601, 801), 1),
        ((0, 0, 800, 600), (301, 401), 1),
        ((0, 0, 800, 600), (300, 400), 2),
        ((0, 0, 800, 600), (150, 200), 4),
        ((0, 0, 800, 600), (150, 201), 2),  # one side decides
        ((0, 0, 800, 600), (75, 100), 8),
        ((0, 0, 800, 600), (10, 13), 8),  # decoders go no further
        ((200, 200, 400, 300), (50, 100), 2),  # a crop
        ((-800, -600, 1600, 1200), (300, 400), 4),  # zoomed out three times: as large as 133 x 100
    ],
)
def test_a_file_is_read_no_larger_than_it_is_seen(view: tuple, size: tuple[int, int], expected: int) -> None:
    image, asked = torch.full((3, 600, 800), 200, dtype=torch.uint8), []

    def read(shrink: int) -> torch.Tensor:
        asked.append(shrink)
        return image[:, ::shrink, ::shrink]

    scene = open_scene(read, (600, 800), [], []).cut(np.array(view, dtype=float), np.empty(0, bool))
    painted = paint(scene, *size)
    assert asked == [expected]
    assert painted.shape == (*size, 3)
    share = np.prod(np.minimum(view[2:], (800, 600)) - np.maximum(view[:2], 0)) / np.prod(
        np.subtract(view[2:], view[:2])
    )
    assert (painted == 200).mean() == pytest.approx(share, abs=0.02)


def test_painting_leaves_the_image_as_it_was() -> None:
    """An image that is given, not read, belongs to the caller."""
    image = torch.arange(3 * 20 * 30, dtype=torch.int64).reshape(3, 20, 30).to(torch.uint8)
    before = image.clone()
    scene = open_scene(lambda _: image, (20, 30), [], [])
    painted = paint(scene, 20, 30)
    assert np.array_equal(painted.transpose(2, 0, 1), before.numpy())
    painted[:] = 0
    assert torch.equal(image, before)
