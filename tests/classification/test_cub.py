from collections import Counter
from pathlib import Path

import pytest

from classification.cub import Bird, hold_out, read_cub
from common.errors import UserError
from tests.birds import COLOURS


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


def test_a_dot_in_a_name_is_no_end_of_a_number(tiny_root):
    folder = tiny_root / "CUB_200_2011"
    names = ["P._major", "001.C._major", "St._Helena_Plover", "4.", "005.Black_Bird"]
    for old, new in zip(COLOURS, names, strict=True):
        (folder / "images" / old).rename(folder / "images" / new)
        for index in ("classes.txt", "images.txt"):
            (folder / index).write_text((folder / index).read_text().replace(f" {old}", f" {new}"))
    assert read_cub(tiny_root).class_names == ["P. major", "C. major", "St. Helena Plover", "4.", "Black Bird"]


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


def draw_folders(root: Path, files: str) -> Path:
    for file in files.split():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.mark.parametrize("test", ["test", "val", "valid"])
def test_reads_a_folder_a_class(tmp_path, test):
    files = f"train/wren/b.jpg train/wren/a.PNG train/1_owl/deep/c.webp train/wren/notes.txt {test}/wren/d.jpg"
    files += f" train/.ipynb_checkpoints/a.jpg train/@eaDir/a.jpg {test}/.ipynb_checkpoints/a.txt"
    files += f" train/wren/@eaDir/b.jpg train/1_owl/deep/.thumbnails/c.webp {test}/wren/.ipynb_checkpoints/d.jpg"
    files += " train/wren/._a.jpg"
    cub = read_cub(draw_folders(tmp_path, files))
    assert cub.class_names == ["1_owl", "wren"]
    train = tmp_path / "train"
    assert cub.train == [
        Bird(train / "1_owl/deep/c.webp", 0),
        Bird(train / "wren/a.PNG", 1),
        Bird(train / "wren/b.jpg", 1),
    ]
    assert cub.test == [Bird(tmp_path / test / "wren/d.jpg", 1)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("train/owl/a.jpg", "train/ without test/ or val/"),
        ("train/owl/a.jpg test/wren/a.jpg", r"test/wren: no class of .*expected owl"),
        ("train/owl/a.jpg test/owl/notes.txt", "test: no images"),
        ("train/owl/a.jpg train/wren/notes.txt test/owl/a.jpg", "train/wren: no images"),
    ],
)
def test_folders_that_do_not_match_are_refused(tmp_path, files, said):
    with pytest.raises(UserError, match=said):
        read_cub(draw_folders(tmp_path, files))


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


def test_nothing_to_hold_out_is_said():
    with pytest.raises(UserError, match=r"holdout=0\.1: none of the 3 classes has two training images"):
        hold_out([Bird(Path(f"{label}.jpg"), label) for label in range(3)], 0.1, seed=0)


def test_one_tree_is_divided_class_by_class_and_the_same_each_time(tmp_path):
    files = " ".join(
        f"{name}/{number}.jpg" for name, count in (("owl", 10), ("wren", 5), ("auk", 1)) for number in range(count)
    )
    root = draw_folders(tmp_path, f"{files} notes/list.txt owl/notes.txt .ipynb_checkpoints/0.jpg __MACOSX/0.jpg")
    cub = read_cub(root)
    assert cub.class_names == ["auk", "owl", "wren"]
    assert Counter(bird.label for bird in cub.test) == {1: 2, 2: 1}
    assert Counter(bird.label for bird in cub.train) == {0: 1, 1: 8, 2: 4}
    assert len({bird.path for bird in cub.train + cub.test}) == 16
    assert read_cub(root) == cub


def test_a_tree_of_single_images_cannot_be_divided(tmp_path):
    with pytest.raises(UserError, match="no class has two images"):
        read_cub(draw_folders(tmp_path, "owl/a.jpg wren/a.jpg"))
