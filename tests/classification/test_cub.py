from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from classification import cub as cub_module
from classification.cub import Bird, BirdDataset, ImageCache, hold_out, read_cub, read_image
from common.errors import UserError


def edit(path: Path, old: str, new: str) -> None:
    lines = path.read_text().splitlines()
    assert old in lines
    path.write_text("\n".join(new if line == old else line for line in lines if not (line == old and not new)) + "\n")


def test_reads_the_official_layout(tiny_root):
    cub = read_cub(tiny_root)
    assert cub.class_names == ["Red Bird", "Green Bird", "Blue Bird", "White Bird", "Black Bird"]
    assert (len(cub.train), len(cub.test)) == (30, 10)
    for bird in cub.train + cub.test:
        assert bird.path.parent.name.startswith(f"{bird.label + 1:03d}.")
    assert {bird.path.name[-8:-4] for bird in cub.test} == {"0006", "0007"}


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("image_class_labels.txt", "7 1", "", "images.txt has 40; image 7 is in only one"),
        ("train_test_split.txt", "40 0", "41 0", "only one of them"),
        ("image_class_labels.txt", "1 1", "1 9", "has class 9, expected one of the 5"),
        ("image_class_labels.txt", "1 1", "1 2", "not of one edition"),
        ("train_test_split.txt", "1 1", "1 2", "expected 1 (training) or 0 (test)"),
        ("classes.txt", "5 005.Black_Bird", "6 005.Black_Bird", "expected the class numbers 1 to 5"),
        ("classes.txt", "5 005.Black_Bird", "4 005.Black_Bird", "expected a new number"),
        ("images.txt", "1 001.Red_Bird/Red_Bird_0000.jpg", "one", "line 1 is 'one'"),
        ("images.txt", "1 001.Red_Bird/Red_Bird_0000.jpg", "1 ../001.Red_Bird/x.jpg", "a path inside images/"),
        (
            "images.txt",
            "1 001.Red_Bird/Red_Bird_0000.jpg",
            "1 001.Red_Bird/none.jpg",
            "none.jpg: no such image (1 of 40",
        ),
    ],
)
def test_index_files_that_disagree_are_refused(tiny_root, file, old, new, complaint):
    edit(tiny_root / "CUB_200_2011" / file, old, new)
    with pytest.raises(UserError) as caught:
        read_cub(tiny_root)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("flag", "part"), [("1", "test"), ("0", "training")])
def test_a_split_without_images_is_refused(tiny_root, flag, part):
    split = tiny_root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text("\n".join(f"{line.split()[0]} {flag}" for line in split.read_text().splitlines()))
    with pytest.raises(UserError, match=f"no {part} images"):
        read_cub(tiny_root)


def test_a_missing_index_file_is_named(tiny_root):
    (tiny_root / "CUB_200_2011" / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes\.txt: no such file.*DATA="):
        read_cub(tiny_root)


def gradient() -> Image.Image:
    columns, rows = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 90)], 2).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "RGBA", "P"])
def test_every_colour_space_becomes_rgb(tmp_path, mode):
    picture = gradient().convert(mode)
    path = tmp_path / ("a.png" if mode in ("RGBA", "P") else "a.jpg")
    picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    ours = read_image(path, side=40)
    assert ours.dtype == torch.uint8
    theirs = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    assert (ours.int() - theirs.int()).abs().max() <= 4


def test_sixteen_bits_a_channel_become_eight(tmp_path):
    Image.fromarray(np.full((8, 8), 256 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 8) == 100).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg"))
    ours = read_image(tmp_path / "turned.jpg", side=40)
    assert (ours.int() - torch.from_numpy(np.array(upright)).permute(2, 0, 1).int()).abs().max() <= 4


@pytest.mark.parametrize("kind", ["cut short", "empty", "not an image"])
def test_an_unreadable_image_is_named(tmp_path, kind):
    path = tmp_path / "broken.jpg"
    gradient().save(path)
    path.write_bytes({"cut short": path.read_bytes()[:400], "empty": b"", "not an image": b"<html></html>"}[kind])
    with pytest.raises(UserError, match=r"broken\.jpg: unreadable image"):
        read_image(path, side=20)
    with pytest.raises(UserError, match=r"broken\.jpg: unreadable image"):
        ImageCache.build([Bird(path, 0)], side=20)


def test_the_cache_holds_what_decoding_gives_and_other_processes_see_it(tiny_root, tmp_path):
    birds = read_cub(tiny_root).train[:6]
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient().save(tmp_path / "turned.jpg", exif=exif)
    birds.append(Bird(tmp_path / "turned.jpg", 0))
    cache = ImageCache.build(birds, side=33)
    for index, bird in enumerate(birds):
        assert torch.equal(cache[index], read_image(bird.path, 33))
    child = get_context("fork").Process(target=lambda: cache[0].fill_(7))
    child.start()
    child.join()
    assert (cache[0] == 7).all()


def test_without_memory_there_is_no_cache_and_one_line_says_so(tiny_root, monkeypatch, caplog):
    monkeypatch.setattr(cub_module, "_available_bytes", lambda: 1000)
    birds = read_cub(tiny_root).train
    assert ImageCache.build(birds, side=40) is None
    assert "decoded again in every epoch" in caplog.text
    image, label, seed = BirdDataset(birds, 40, v2.CenterCrop(32))[(3, 5)]
    assert image.shape == (3, 32, 32)
    assert (label, seed) == (birds[3].label, 5)


def test_a_crop_depends_on_its_seed_alone(tiny_root):
    dataset = BirdDataset(read_cub(tiny_root).train, 40, v2.RandomResizedCrop(32, antialias=True))
    before = torch.random.get_rng_state()
    first = dataset[(0, 11)][0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(dataset[(0, 11)][0], first)
    assert not torch.equal(dataset[(0, 12)][0], first)


def test_hold_out_takes_its_share_of_every_class():
    birds = [Bird(Path(f"{label}-{number}.jpg"), label) for label in range(7) for number in range(10)]
    rest, held = hold_out(birds, 0.2, seed=3)
    assert Counter(bird.label for bird in held) == dict.fromkeys(range(7), 2)
    assert sorted(rest + held) == sorted(birds)
    assert hold_out(birds, 0.2, seed=3) == (rest, held)
    assert hold_out(birds, 0.2, seed=4)[1] != held
    lonely = [Bird(Path("a.jpg"), 0), Bird(Path("b.jpg"), 1), Bird(Path("c.jpg"), 1)]
    rest, held = hold_out(lonely, 0.01, seed=0)
    assert Counter(bird.label for bird in rest) == {0: 1, 1: 1}
