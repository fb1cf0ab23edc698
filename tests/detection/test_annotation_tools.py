"""Folders in the form in which annotation tools export VOC, each read, mapped and checked.

Written after the documentation or source of each tool: labelImg, CVAT, Roboflow, make-sense, VoTT, LabelMe's converter
and Supervisely.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from common.errors import UserError
from detection.dataset_mapper import DatasetMapper
from detection.voc import default_test, default_train, load_voc_instances, read_labels, register_voc
from detection.voc_lists import read_ids
from tools import check_datasets

WIDTH, HEIGHT = 64, 48
NAMES = [f"street {number}" for number in range(6)]
CORNERS = {name: (number + 2, number + 3, number + 22, number + 33) for number, name in enumerate(NAMES)}
"""The box of each picture's van as all tools but VoTT and LabelMe write it, in whole pixels; the last has none."""

SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "teal").save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")


def box(corners: tuple) -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    return f"<bndbox>{''.join(f'<{tag}>{value}</{tag}>' for tag, value in tags)}</bndbox>"


def van(name: str, flags: str, before: str = "", after: str = "", shift: float = 0) -> str:
    """The object of a picture, if it has one."""
    if name == NAMES[-1]:
        return ""
    corners = tuple(value + shift for value in CORNERS[name])
    return f"<object><name>van</name>{before}{flags}{box(corners)}{after}</object>"


PLAIN = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"


def label_img(root: Path) -> None:
    """Annotations beside the pictures, no lists; a picture without objects has one as well."""
    for name in NAMES:
        picture(root / f"{name}.jpg")
        source = "<source><database>Unknown</database></source>"
        head = f"<folder>x</folder><filename>{name}.jpg</filename><path>C:\\x\\{name}.jpg</path>{source}"
        text = f"<annotation>{head}{SIZE}<segmented>0</segmented>{van(name, PLAIN)}</annotation>"
        write(root / f"{name}.xml", text)


def cvat(root: Path) -> None:
    """One list for all, Main/default.txt, and attributes in the objects."""
    flags = "<truncated>False</truncated><occluded>0</occluded><difficult>False</difficult>"
    extra = "<attributes><attribute><name>rotation</name><value>0.0</value></attribute></attributes>"
    for name in NAMES:
        picture(root / "JPEGImages" / f"{name}.PNG")
        text = f"<annotation><folder/><filename>{name}.PNG</filename>{SIZE}{van(name, flags, after=extra)}</annotation>"
        write(root / "Annotations" / f"{name}.xml", text)
    write(root / "ImageSets/Main/default.txt", "\n".join(NAMES) + "\n")
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\nbackground:::\ncar:::\n")


def roboflow(root: Path) -> None:
    """A folder a split, annotations beside the pictures."""
    for number, name in enumerate(NAMES):
        folder = root / ("valid" if number % 5 == 4 else "train")
        picture(folder / f"{name}.jpg")
        flags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult><occluded>0</occluded>"
        write(folder / f"{name}.xml", f"<annotation><folder></folder>{SIZE}{van(name, flags)}</annotation>")
    write(root / "README.dataset.txt", "vans")


def make_sense(root: Path) -> None:
    """Annotations alone, put beside the pictures; there is none for a picture without objects."""
    for name in NAMES:
        picture(root / f"{name}.jpg")
        if found := van(name, PLAIN.replace("0", "Unspecified")):
            source = "<source><database>Unspecified</database></source>"
            write(root / f"{name}.xml", f"<annotation>\n\t<folder>p</folder>{source}{SIZE}{found}\n</annotation>")


def vott(root: Path) -> None:
    """Lists of one class alone, which name files; fractions of pixels."""
    for name in NAMES:
        picture(root / "JPEGImages" / f"{name}.jpg")
        text = (
            f'<annotation verified="yes"><folder>Annotation</folder>{SIZE}{van(name, PLAIN, shift=0.25)}</annotation>'
        )
        write(root / "Annotations" / f"{name}.xml", text)
    for split, members in (("train", [*NAMES[:4], NAMES[5]]), ("val", NAMES[4:5])):
        for tag, labels in (("van", [1 if name != NAMES[-1] else -1 for name in members]), ("bus", [-1] * 5)):
            lines = [f"{name}.jpg {label}" for name, label in zip(members, labels, strict=False)]
            write(root / f"ImageSets/Main/{tag}_{split}.txt", "\r\n".join(lines))


def label_me(root: Path) -> None:
    """No lists, empty flags, another <annotation> inside, pixels counted from 0."""
    for name in NAMES:
        picture(root / "JPEGImages" / f"{name}.jpg")
        flags = "<pose></pose><truncated></truncated><difficult></difficult>"
        head = f"<folder></folder><filename>{name}.jpg</filename><database></database><annotation></annotation>"
        text = f"<annotation>{head}<image></image>{SIZE}<segmented></segmented>{van(name, flags)}</annotation>"
        write(root / "Annotations" / f"{name}.xml", text)
        picture(root / "AnnotationsVisualization" / f"{name}.jpg")
    write(root / "class_names.txt", "_background_\ncar")


def supervisely(root: Path) -> None:
    """Lists of whole splits beside those of one class, and masks."""
    for name in NAMES:
        picture(root / "JPEGImages" / f"{name}.jpg")
        picture(root / "SegmentationClass" / f"{name}.png")
        text = f"<annotation><folder>VOC_p</folder>{SIZE}<segmented>1</segmented>{van(name, PLAIN)}</annotation>"
        write(root / "Annotations" / f"{name}.xml", text)
    train, held = [*NAMES[:4], NAMES[5]], NAMES[4:5]
    for split, members in (("train", train), ("val", held), ("trainval", NAMES)):
        write(root / f"ImageSets/Main/{split}.txt", "\n".join(members) + "\n")
        write(root / f"ImageSets/Main/van_{split}.txt", "".join(f"{name} 1\n" for name in members))
        write(root / f"ImageSets/Segmentation/{split}.txt", "\n".join(members) + "\n")
    write(root / "colors.txt", "neutral 224 224 192\ncar 255 0 0\n")


@pytest.mark.parametrize("export", [label_img, cvat, roboflow, make_sense, vott, label_me, supervisely])
def test_an_export_is_read_mapped_and_complete(
    export: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "my export"
    export(root)
    for path in [path for path in root.rglob("*") if path.suffix.lower() in (".xml", ".jpg", ".png")]:
        write(path.with_name(f"._{path.name}"), "macOS puts this beside it")
    assert read_labels(root) == ("van",)
    assert (default_train(root), default_test(root)) == (("voc_train",), ("voc_val",))
    register_voc(root)
    train, held = (DatasetCatalog.get(f"voc_{split}") for split in ("train", "val"))
    given = [name for name in NAMES if export is not make_sense or name != NAMES[-1]]
    assert sorted(Path(record["image_id"]).name for record in train + held) == given
    assert [Path(record["image_id"]).name for record in held] == [NAMES[4]]
    mapper = DatasetMapper(augmentations=[], min_sizes=[HEIGHT], max_size=WIDTH, with_annotations=True)
    for record in train + held:
        name, shift = Path(record["image_id"]).name, 0.25 if export is vott else 0
        x0, y0, x1, y1 = (value + shift for value in CORNERS[name])
        expected = [[x0 - 1, y0 - 1, x1, y1]] if name != NAMES[-1] else []
        assert mapper(record)["instances"].gt_boxes.tensor.tolist() == expected

    monkeypatch.setattr("sys.argv", ["check_datasets", "--data", str(root), "--deep"])
    check_datasets.main()
    assert "train: 4 objects (van 4)" in capsys.readouterr().out


def test_lists_of_the_users_own_are_not_passed_over(tmp_path: Path) -> None:
    label_me(tmp_path)
    write(tmp_path / "ImageSets/Main/mine.txt", "street 1\n")
    with pytest.raises(UserError, match="lists of no split found; expected trainval"):
        default_train(tmp_path)


def test_of_an_official_folder_nothing_stands_in_for_its_lists(tmp_path: Path) -> None:
    label_me(tmp_path / "VOC2007")
    with pytest.raises(UserError, match="ImageSets is missing; expected the image ids"):
        read_ids(tmp_path / "VOC2007", "train")


def test_one_image_cannot_be_divided(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.xml", f"<annotation>{SIZE}{van(NAMES[0], PLAIN)}</annotation>")
    with pytest.raises(UserError, match="one image, expected two or more"):
        load_voc_instances(tmp_path, "train", ("van",))
