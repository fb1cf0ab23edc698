"""Finding images by name, folder and pattern, and decoding them; Pillow is the judge."""

import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from common.errors import UserError
from common.images import (
    find_images,
    read_headers,
    read_image,
    read_shrunk_image,
    read_size,
    refuse_unreadable,
    write_picture,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.JPG", "c.png", "notes.txt", "d e.jpeg", "sub/f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_names_folders_and_patterns(folder: Path) -> None:
    assert [path.name for path in find_images([str(folder)])] == ["a.JPG", "b.jpg", "c.png", "d e.jpeg"]
    assert find_images([str(folder / "d e.jpeg")]) == [folder / "d e.jpeg"]
    assert [path.name for path in find_images([f"{folder}/*.jpg"])] == ["b.jpg"]
    assert [path.name for path in find_images([f"{folder}/*/f.jpg"])] == ["f.jpg"]
    assert find_images([]) == []
    (folder / "._b.jpg").touch()  # macOS puts it beside the photograph
    assert len(find_images([str(folder)])) == 4
    assert [path.name for path in find_images([f"{folder}/*.jpg"])] == ["b.jpg"]
    assert [path.name for path in find_images([f"{folder}/.*.jpg"])] == ["._b.jpg"]


def test_a_name_that_is_there_is_no_pattern(folder: Path) -> None:
    for name in ("*.jpg", "[1] (a) $b & c.jpg"):
        (folder / name).touch()
        assert find_images([str(folder / name)]) == [folder / name]
    (folder / "b").mkdir()
    assert find_images([f"{folder}/b*"]) == [folder / "b.jpg"]  # and a folder is none of a pattern's files


def test_a_name_that_is_there_comes_before_the_names_in_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("b.jpg c.png").touch()
    assert find_images(["b.jpg c.png"]) == [Path("b.jpg c.png")]
    assert find_images(["b.jpg c.png d e.jpeg"]) == [Path("b.jpg c.png"), Path("d e.jpeg")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("b.jpg c.png", ["b.jpg", "c.png"]),
        ("c.png  d e.jpeg b.jpg", ["c.png", "d e.jpeg", "b.jpg"]),
        ("d e.jpeg", ["d e.jpeg"]),
        ("'d e.jpeg' \"b.jpg\"", ["d e.jpeg", "b.jpg"]),
        ("sub ?.jpg", ["sub/f.jpg", "b.jpg"]),
        ("it's 1 & (2).jpg b.jpg", ["it's 1 & (2).jpg", "b.jpg"]),
    ],
)
def test_a_name_may_be_several_as_makes_variable_holds_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: list[str]
) -> None:
    (folder / "it's 1 & (2).jpg").touch()
    monkeypatch.chdir(folder)
    assert find_images([text]) == [Path(name) for name in expected]


def test_many_names_are_longer_together_than_any_file_may_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names = [f"IMG_{number:04d}.jpg" for number in range(400)]
    for name in names:
        Path(name).touch()
    assert find_images([" ".join(names)]) == [Path(name) for name in names]
    with pytest.raises(UserError, match=r"^x+: no such file"):
        find_images(["x" * 300])
    with pytest.raises(UserError, match=r"^\*\*\.jpg: no such file"):
        find_images(["**.jpg"])


def test_other_suffixes_may_count_in_a_folder(folder: Path) -> None:
    assert [path.name for path in find_images([str(folder)], {".txt", ".png"})] == ["c.png", "notes.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_no_table_could_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    gradient().save(path)
    for read in (read_image, read_size):
        with pytest.raises(UserError, match="its name is not UTF-8"):
            read(path)


@pytest.mark.parametrize("missing", ["my photo.jpg", "it's not there.jpg"])
def test_a_missing_name_with_blanks_is_named_whole(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=f"^{missing}: no such file"):
        find_images([f"b.jpg {missing}"])


def test_relative_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_images(["*.png", "sub"]) == [Path("c.png"), Path("sub/f.jpg")]
    monkeypatch.setenv("HOME", str(folder / "sub"))
    assert find_images(["~/*.jpg"]) == [folder / "sub/f.jpg"]


def test_each_image_once_in_the_order_of_the_names(folder: Path) -> None:
    found = find_images([str(folder / "c.png"), str(folder), str(folder / "b.jpg")])
    assert [path.name for path in found] == ["c.png", "a.JPG", "b.jpg", "d e.jpeg"]


def test_what_is_not_there(folder: Path) -> None:
    (folder / "empty").mkdir()
    for name, what in (("x.jpg", "no such file"), ("*.gif", "no such file"), ("empty", "no image in this folder")):
        with pytest.raises(UserError, match=what) as error:
            find_images([str(folder / "b.jpg"), str(folder / name)])
        assert str(folder / name) in str(error.value)


def gradient() -> Image.Image:
    """60 x 40 pixels, red to the right and green downwards."""
    columns, rows = np.meshgrid(np.linspace(0, 255, 60), np.linspace(0, 255, 40))
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 90)], 2).astype(np.uint8))


def assert_reads_as(path: Path, picture: Image.Image, tolerance: int) -> None:
    read = read_image(path)
    assert read.dtype == torch.uint8
    expected = np.asarray(picture.convert("RGB")).astype(int)
    assert read.shape == (3, *expected.shape[:2])
    assert np.abs(read.permute(1, 2, 0).numpy() - expected).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.jpg", "RGB"),
        ("a.jpg", "L"),
        ("a.jpg", "CMYK"),
        ("a.png", "RGBA"),
        ("a.png", "P"),
        ("a.png", "LA"),
        ("a.gif", "P"),
        ("a.webp", "RGB"),
        ("a.bmp", "RGB"),
        ("a.tif", "RGB"),
        ("a.tiff", "CMYK"),
        ("a.tif", "L"),
    ],
)
def test_every_colour_mode_becomes_rgb(tmp_path: Path, name: str, mode: str) -> None:
    options = {"quality": 95, "subsampling": 0} if name == "a.jpg" else {"lossless": True} if name == "a.webp" else {}
    gradient().convert(mode).save(tmp_path / name, **options)
    assert_reads_as(tmp_path / name, Image.open(tmp_path / name), tolerance=4)


@pytest.mark.parametrize(
    ("name", "shape"), [("a.png", (20, 30)), ("a.png", (20, 30, 3)), ("a.png", (20, 30, 4)), ("a.tif", (20, 30))]
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_sixteen_bits_the_upper_eight_are_read(
    tmp_path: Path, name: str, shape: tuple[int, ...], turned: bool
) -> None:
    """OpenCV writes them."""
    deep = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    cv2.imwrite(str(tmp_path / name), deep)
    expected = deep[..., 2::-1] if deep.ndim == 3 else deep[..., None]
    read = read_image(tmp_path / name, turned=turned).permute(1, 2, 0).numpy()
    assert (read == expected // 256).all()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_without_a_scale_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.linspace(0, 1000, 600).reshape(20, 30).astype(kind)).save(tmp_path / "heights.tif")
    with pytest.raises(UserError, match=r"heights\.tif: cannot be read as an image \(its pixels have 32 bits"):
        read_image(tmp_path / "heights.tif")


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_transparent_palette_gives_its_colours(tmp_path: Path) -> None:
    picture = gradient().quantize(16)
    picture.save(tmp_path / "a.png", transparency=bytes(range(0, 256, 16)))
    assert_reads_as(tmp_path / "a.png", picture, tolerance=0)


def test_an_animation_gives_its_first_picture(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif")[:, 0, 0].tolist() == [255, 0, 0]


def test_of_an_animation_only_the_first_picture_is_decoded(tmp_path: Path) -> None:
    """The later ones are spoilt here, which whoever decodes them would notice."""
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (40, 60), np.uint8)) for n in range(9)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert_reads_as(path, frames[0], tolerance=0)


def test_what_unfolds_to_too_many_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(UserError, match=r"bomb\.png: has more than 178,956,970 pixels"):
        read_image(tmp_path / "bomb.png")
    gradient().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=60 * 40).shape == (3, 40, 60)
    with pytest.raises(UserError, match=r"a\.png: has more than 2,399 pixels"):
        read_image(tmp_path / "a.png", max_pixels=60 * 40 - 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    gradient().save(path, exif=exif, **options)
    assert_reads_as(path, ImageOps.exif_transpose(Image.open(path)), tolerance=4)
    assert read_size(path) == tuple(read_image(path).shape[1:]) == ((40, 60) if orientation < 5 else (60, 40))
    (header,) = read_headers([path])
    assert (header.orientation, header.stored) == (orientation, (40, 60))
    stored = read_image(path, turned=False).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(stored - np.asarray(gradient())).max() <= 4


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("jpg", {"xmp": XMP}),
        *((suffix, {"exif": exif}) for suffix in ("jpg", "webp") for exif in (b"Exif\0\0none", b"Exif\0\0II*\0\x08")),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_orientation_that_no_decoder_heeds_is_none(tmp_path: Path, suffix: str, options: dict) -> None:
    """Spoilt EXIF, which torchvision passes over and Pillow would end at; XMP, which Pillow alone would heed."""
    path = tmp_path / f"a.{suffix}"
    gradient().save(path, **options)
    assert read_headers([path]) == [(40, 60, 1)]
    assert read_shrunk_image(path, 2)[1] == tuple(read_image(path).shape[1:]) == (40, 60)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp"])
def test_a_header_is_read_without_the_pixels_behind_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    assert read_size(path) == (300, 400)


def test_headers_of_many_files_with_what_is_wrong_with_each(tmp_path: Path) -> None:
    """A form that Pillow knows and no decoder here is no image."""
    gradient().save(tmp_path / "a.png")
    gradient().save(tmp_path / "b.jpg", format="PPM")
    (tmp_path / "c.jpg").write_text("\ufeff\n<!DOCTYPE html><title>Sign in</title>")
    (tmp_path / "d.jpg").touch()
    for name in ("e.bmp", "g.jpg", "h.png"):
        gradient().save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-60])
    gradient().save(tmp_path / "i.jpg")
    (tmp_path / "i.jpg").write_bytes((tmp_path / "i.jpg").read_bytes() + b"of the camera's own")
    paths = [
        tmp_path / name for name in ("a.png", "b.jpg", "c.jpg", "d.jpg", "e.bmp", "f.jpg", "g.jpg", "h.png", "i.jpg")
    ]
    sound, of_another_form, page, empty, cut, missing, cut_jpeg, cut_png, longer = read_headers(paths)
    assert sound == cut == longer == (40, 60, 1)
    assert all("truncated" in str(reason) for reason in (cut_jpeg, cut_png))
    assert [str(reason).partition(" (")[0] for reason in (of_another_form, empty)] == ["cannot be read as an image"] * 2
    assert page == "is a web page, expected the file that its link leads to: fetch that"
    assert str(missing).startswith("no such file")
    assert isinstance(read_headers(paths, decode=True)[4], str)
    with pytest.raises(UserError) as error:
        refuse_unreadable(paths)
    assert str(error.value).startswith(f"{paths[1]}: cannot be read as an image")
    assert str(error.value).endswith(f"; 5 more cannot be taken: {', '.join(map(str, (*paths[2:4], *paths[5:8])))}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"no image at all"),
        ("magic.jpg", b"\xff\xd8\xff"),
        ("magic.png", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        read_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jpg.*no such file"):
        read_image(tmp_path / "nowhere.jpg")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_image(path)


@pytest.mark.parametrize("place", ["IHDR", "IDAT"])
def test_a_damaged_png_is_refused(tmp_path: Path, place: str) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(place.encode()) + 6] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"^[^\n]*image\.png: cannot be read as an image[^\n]*$"):
        read_image(path)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_jpeg_is_shrunk_by_its_decoder(tmp_path: Path, shrink: int, orientation: int, turned: bool) -> None:
    """By OpenCV, whose reading of EXIF is held against torchvision's here."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)).resize((163, 101))
    picture.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    whole = read_image(tmp_path / "photo.jpg", turned=turned)
    image, size = read_shrunk_image(tmp_path / "photo.jpg", shrink, turned)
    assert size == tuple(whole.shape[1:])
    assert tuple(image.shape[1:]) == tuple(-(-side // shrink) for side in size)
    expected = v2.functional.resize(whole, list(image.shape[1:]))
    assert (image.int() - expected.int()).abs().float().mean() < 8


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGB"), ("a.jpg", "CMYK"), ("a.webp", "RGB"), ("a.gif", "P")])
def test_what_no_decoder_shrinks_comes_whole(tmp_path: Path, name: str, mode: str) -> None:
    Image.new("RGB", (80, 60), (204, 51, 102)).convert(mode).save(tmp_path / name)
    image, size = read_shrunk_image(tmp_path / name, 4)
    assert size == (60, 80)
    assert torch.equal(image, read_image(tmp_path / name))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_truncated_jpeg_is_refused_when_shrunk_too(tmp_path: Path, share: float) -> None:
    path = tmp_path / "image.jpg"
    gradient().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match="cannot be read as an image"):
        read_shrunk_image(path, 4)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_shrunk_image(path, 4)


def test_a_suffix_does_not_decide_and_brackets_of_a_folder_are_letters(tmp_path: Path) -> None:
    folder = tmp_path / "o [1]"
    folder.mkdir()
    gradient().save(folder / "x*.jpg", format="BMP")
    assert_reads_as(folder / "x*.jpg", gradient(), tolerance=0)
    assert find_images([f"{folder}/*.jpg"]) == find_images([f"{folder}/x*.jpg"]) == [folder / "x*.jpg"]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_written_without_a_word(tmp_path, capfd, suffix):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 30:] = (200, 100, 50)
    write_picture(tmp_path / f"a{suffix}", pixels)
    assert capfd.readouterr() == ("", "")
    with Image.open(tmp_path / f"a{suffix}") as written:
        assert np.abs(np.asarray(written).astype(int) - pixels)[:, [10, 50]].max() <= (0 if suffix == ".png" else 3)
