"""Headers of pictures held against annotations: what training refuses at its start, and what it keeps in a cache."""

import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from common.errors import UserError
from detection import train_net
from detection.config import get_cfg, merge_options, read_run_cfg
from detection.dataset_mapper import DatasetMapper
from detection.voc import register_voc
from detection.voc_annotations import annotation_xml
from detection.voc_pictures import cached_headers, find_odd
from tools import check_datasets

WIDTH, HEIGHT = 40, 30
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def draw(path: Path, orientation: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT), form: str | None = None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "teal").save(path, form, exif=exif)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of one object, three of them to train on."""
    root = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for name in "abcd":
        draw(root / f"JPEGImages/{name}.jpg")
        xml = annotation_xml(f"{name}.jpg", HEIGHT, WIDTH, [("cat", (4, 5, 24, 25))])
        (root / f"Annotations/{name}.xml").write_text(xml)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\n")
    (root / "ImageSets/Main/val.txt").write_text("d\n")
    return root


def pictures(root: Path, names: str = "abc") -> list[str]:
    return [str(root / f"JPEGImages/{name}.jpg") for name in names]


@pytest.mark.parametrize("name", ["b", "d"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as an image"),
        (LFS.encode(), "is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
        (b"<html><body>Sign in</body></html>", "is a web page, expected the file that its link leads to: fetch that"),
        (b"\xff\xd8\xff\xe0 and no more", "cannot be read as an image"),
        ("PPM", "cannot be read as an image"),
        ((WIDTH + 1, HEIGHT), "image is 41x30, its annotation says 40x30; mend <size> in the annotation or replace"),
        ((HEIGHT, WIDTH), "image is 30x40, its annotation says 40x30; mend <size> in the annotation or replace"),
    ],
)
def test_training_and_check_refuse_the_same_at_their_start(
    folder: Path,
    tmp_path: Path,
    name: str,
    content: bytes | str | tuple[int, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = folder / f"JPEGImages/{name}.jpg"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        draw(
            path,
            size=content if isinstance(content, tuple) else (WIDTH, HEIGHT),
            form="PPM" if content == "PPM" else None,
        )
    output = tmp_path / "output"
    words = ["train_net", "--data", str(folder), "--pretrained", "0", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as exit:
        train_net.main()
    assert exit.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {path}: {said}")
    assert not output.exists()
    monkeypatch.setattr("sys.argv", ["check_datasets", "--data", str(folder)])
    with pytest.raises(SystemExit) as exit:
        check_datasets.main()
    assert exit.value.code == 2
    expected = "broken: JPEGImages/" + (f"{name}.jpg: empty" if content == b"" else f"{name}.jpg: {said}")
    table = capsys.readouterr().out
    assert expected in table
    assert table.count(" complete ") == 1
    assert re.search(r" broken +(\d of \d)", table)[1] == {"b": "2 of 3", "d": "0 of 1"}[name]


def test_several_odd_pictures_are_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    for path in pictures(folder):
        Path(path).write_bytes(b"none")
    args = train_net.parse_args(["--data", str(folder), "--pretrained", "0"])
    with pytest.raises(UserError) as error:
        train_net.new_experiment(args).resolve()
    first, second, third = pictures(folder)
    assert str(error.value).startswith(f"{first}: cannot be read as an image (")
    assert str(error.value).endswith(f"; 2 more cannot be taken: {second}, {third}")


@pytest.mark.parametrize("exif", ["auto", "stored"])
def test_what_is_odd_is_what_the_mapper_refuses(tmp_path: Path, exif: str) -> None:
    mapper = DatasetMapper(augmentations=[], min_sizes=[20], max_size=60, with_annotations=True, exif=exif)
    sizes = [(HEIGHT, WIDTH), (WIDTH, HEIGHT), (HEIGHT, HEIGHT), (HEIGHT, WIDTH + 1)]
    for orientation, suffix, size in itertools.product(range(1, 9), ("jpg", "png", "webp", "tif"), sizes):
        path = tmp_path / f"{orientation}.{suffix}"
        if not path.exists():
            draw(path, orientation)
        odd, _ = find_odd([str(path)], [size], cached_headers(tmp_path, "train", [str(path)]))
        try:
            mapper({"file_name": str(path), "height": size[0], "width": size[1], "annotations": []})
            refused = None
        except UserError as error:
            refused = str(error).removeprefix(f"{path}: ")
        assert bool(odd) == bool(refused)
        if exif == "auto":
            assert odd.get(str(path)) == refused


def test_what_the_size_cannot_tell_is_counted(folder: Path, monkeypatch, capsys, caplog) -> None:
    first, second, third = pictures(folder)
    draw(Path(first), 3)
    draw(Path(second), 6)  # its annotation is of the pixels as they are stored
    draw(Path(third), 2)
    headers = cached_headers(folder, "train", [first, second, third])
    assert find_odd([first, second, third], [(HEIGHT, WIDTH)] * 3, headers) == ({}, [first, third])
    draw(Path(third), 8, (30, 30))
    (header,) = cached_headers(folder, "train", [third])
    assert find_odd([third], [(30, 30)], [header]) == ({}, [third])
    draw(Path(third), 7)
    monkeypatch.setattr("sys.argv", ["check_datasets", "--data", str(folder)])
    check_datasets.main()
    said = capsys.readouterr().out
    assert "EXIF turns or mirrors 1 images without a trace in their size, JPEGImages/a.jpg first" in said
    for words, is_said in ([], True), (["INPUT.EXIF", "stored"], False):
        caplog.clear()
        train_net.new_experiment(train_net.parse_args(["--data", str(folder), "--pretrained", "0", *words])).resolve()
        assert ("voc_train: EXIF turns or mirrors 1 images" in caplog.text) == is_said


def test_headers_are_read_once_and_again_when_their_file_has_changed(folder: Path) -> None:
    files = pictures(folder)
    before = cached_headers(folder, "train", files)
    assert before == [(HEIGHT, WIDTH, 1)] * 3
    for file in files:  # spoilt so that neither size nor time tells
        stat = Path(file).stat()
        Path(file).write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cached_headers(folder, "train", files[::-1]) == before
    os.utime(files[1], ns=(0, 0))
    first, second, third = cached_headers(folder, "train", files)
    assert first == third == (HEIGHT, WIDTH, 1)
    assert isinstance(second, str)
    draw(Path(files[1]), 6)
    Path(files[2]).unlink()
    first, second, third = cached_headers(folder, "train", files)
    assert (first, second) == ((HEIGHT, WIDTH, 1), (WIDTH, HEIGHT, 6))
    assert str(third).startswith("no such file")


@pytest.mark.parametrize("damage", ["cut", "another form", "other arrays"])
def test_a_damaged_cache_is_built_anew(folder: Path, damage: str) -> None:
    files = pictures(folder)
    expected = cached_headers(folder, "train", files)
    cache = folder / ".voc_cache/train-headers.npz"
    whole = cache.read_bytes()
    if damage == "cut":
        cache.write_bytes(whole[: len(whole) // 2])
    elif damage == "another form":
        np.savez(cache, names=np.array(["a"]), headers=np.zeros(1))
    else:
        np.savez(cache, ids=np.zeros(3))
    assert cached_headers(folder, "train", files) == expected
    assert len(cache.read_bytes()) == len(whole)


def test_boxes_drawn_on_stored_pixels_lie_on_them_with_exif_stored(folder: Path, tmp_path: Path) -> None:
    """A red box in the upper left, on pictures that their tag mirrors, turns by 180 degrees and flips."""
    x0, y0, x1, y1 = 2, 1, 12, 11
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[y0:y1, x0:x1, 0] = 255
    exif = Image.Exif()
    for file, orientation in zip(pictures(folder), (2, 3, 4), strict=True):
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, exif=exif, quality=95, subsampling=0)
        xml = annotation_xml(file, HEIGHT, WIDTH, [("cat", (x0, y0, x1, y1))])
        (folder / f"Annotations/{Path(file).stem}.xml").write_text(xml)
    register_voc(folder)
    for setting, is_right in (("stored", True), ("auto", False)):
        cfg = get_cfg()
        merge_options(cfg, ["INPUT.AUGMENTATIONS", "[]", "INPUT.EXIF", setting, "INPUT.MIN_SIZE_TRAIN", f"({HEIGHT},)"])
        cfg.INPUT.MIN_SIZE_TEST = HEIGHT
        (tmp_path / "config.yaml").write_text(cfg.dump())
        cfg = read_run_cfg(tmp_path)
        # Of training, of the validation loss and of evaluation.
        validation = DatasetMapper(cfg, False, with_annotations=True)
        for mapper in (DatasetMapper(cfg, True), validation, DatasetMapper(cfg, False)):
            for record in DatasetCatalog.get("voc_train"):
                for image in (mapper(record)["image"], mapper.read(record)):
                    red = (image[0, y0:y1, x0:x1] > 200).float().mean().item()
                    assert (red > 0.95) == is_right, setting
