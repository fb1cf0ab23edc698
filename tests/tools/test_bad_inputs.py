"""What a user can hand over that is broken, hostile or of another kind, and the line that each is answered with.

Every row runs a command line on an input of its own, in this process. Whatever that is, there is no traceback: exit
code 2, one line that names the file, and every file of the user's as it was.
"""

import importlib
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from tests.birds import draw_birds
from tests.tools.scenes import draw_scene

FRCNN, YOLOV3, BIRD = "faster_rcnn_R_50_FPN-sample", "yolov3_darknet53_study", "resnet18-best-2"  # runs of `output`
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


class Runs:
    """In a pickle: makes a folder when it is read carelessly."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("it ran",)


class Case(NamedTuple):
    """A row.

    Attributes:
        command: the module, and its command line in a folder with sound data, runs and a picture: see `here`.
        spoil: puts the bad input there.
        line: what the user sees; … stands for words of a library, or for the rest of a long line.
    """

    command: str
    spoil: Callable[[], object]
    line: str


def put(path: str, content: str | bytes) -> Callable[[], object]:
    """Writes a file, in the place of a sound one where there is one."""

    def write() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def folder(path: str) -> Callable[[], object]:
    def make() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)

    return make


def cut(path: str) -> Callable[[], object]:
    return lambda: os.truncate(path, Path(path).stat().st_size // 2)


def sparse(path: str, size: int) -> Callable[[], object]:
    return lambda: (put(path, "")(), os.truncate(path, size))


def picture(path: str, width: int, height: int) -> Callable[[], object]:
    def draw() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("1", (width, height)).save(path, "PNG")

    return draw


def each(*spoils: Callable[[], object]) -> Callable[[], object]:
    return lambda: [spoil() for spoil in spoils]


def nothing() -> None:
    """The command line alone is wrong."""


def annotation(*objects: str, size: str = "<width>64</width><height>48</height>") -> str:
    return f"<annotation><size>{size}</size>{''.join(objects)}</annotation>"


def xml(text: str) -> Callable[[], object]:
    return put("voc/Annotations/a.xml", text)


def box(*corners: object, name: str = "red") -> Callable[[], object]:
    return xml(annotation(OBJECT.format(name, *corners)))


def weights(value: object) -> Callable[[], object]:
    return lambda: torch.save(value, "run/model_best.pth")


def safetensors(size: int | None = None, **tensors: tuple[list[int], list[int]]) -> Callable[[], object]:
    """A file whose header says of each tensor its shape and its place, and that it has this size itself."""
    entries = {name: {"dtype": "F32", "shape": s, "data_offsets": at} for name, (s, at) in tensors.items()}
    header = json.dumps(entries).encode()
    return put("run/model_best.pth", struct.pack("<Q", size or len(header)) + header + bytes(16))


def detection(**changes: object) -> Callable[[], object]:
    entry = {"image_id": "c", "category": "red", "bbox": [1, 2, 3, 4], "score": 0.5, **changes}
    return put("boxes.json", json.dumps([entry]))


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]>{annotation(OBJECT.format("&l9;", 1, 1, 9, 9))}'
EXTERNAL = f'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>{annotation(OBJECT.format("&x;", 1, 1, 9, 9))}'
TAG = "!!python/object/apply:os.mkdir [it ran]"
DARKNET = struct.pack("<iiiq", 0, 2, 0, 0)

CHECK = "tools.check_datasets --data voc"
TRAIN = "detection.train_net --data voc --pretrained 0"
OWN = f"{TRAIN} --config own.yaml"
START = "detection.train_net --data voc --model yolov3 --start"
PREDICT = "tools.predict good.png --out out --weights"
LOOK = "tools.predict --weights run --out out good.png"
NAME = "tools.predict_bird --weights bird good.png"
SCORE = "tools.eval_detections boxes.json --data voc"
FINETUNE = (
    "classification.train pretrained=0 data=birds model=test_resnet image_size=32 workers=0 batch_size=2 epochs=1"
)
RECIPE = "classification.train own.yaml data=birds"
A, W, INDEX = "voc/Annotations/a.xml", "run/model_best.pth", "birds/CUB_200_2011/images.txt"
BIRD_PHOTO = "birds/CUB_200_2011/images/001.Red_Bird/Red_Bird_0000.jpg"
LEFT_OUT = "; left out"

# fmt: off
CASES = {
    # annotations
    "an entity bomb": Case(CHECK, xml(BOMB),
        "Annotations/a.xml: not well-formed XML (…); mend the file or fetch it again"),
    "an external entity": Case(CHECK, xml(EXTERNAL),
        "Annotations/a.xml: not well-formed XML (…); mend the file or fetch it again"),
    "XML without end": Case(CHECK, xml("<a>" * 100_000),
        "Annotations/a.xml: not well-formed XML (…); mend the file or fetch it again"),
    "an empty annotation": Case(CHECK, xml(""), "Annotations/a.xml: empty"),
    "an annotation cut off": Case(TRAIN, cut(A),
        "voc/Annotations/a.xml: not well-formed XML (…); mend the file or fetch it again"),
    "a web page as annotation": Case(TRAIN, xml(PAGE),
        "voc/Annotations/a.xml: is a web page, expected the file that its link leads to: fetch that"),
    "a pointer as annotation": Case(TRAIN, xml(LFS),
        "voc/Annotations/a.xml: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
    "a folder as annotation": Case(TRAIN, folder(A), "voc/Annotations/a.xml: cannot be read: Is a directory"),
    "no size": Case(TRAIN, xml("<annotation/>"),
        "voc/Annotations/a.xml: <size> with <width> and <height> is missing or holds no numbers"),
    "a size of 0": Case(TRAIN, xml(annotation(size="<width>0</width><height>48</height>")),
        "voc/Annotations/a.xml: the image size is 0 x 48; expected two whole numbers above 0, at most…"),
    "a size beyond all": Case(TRAIN, xml(annotation(size="<width>1e300</width><height>1e300</height>")),
        "voc/Annotations/a.xml: the image size is 1e+300 x 1e+300; expected two whole numbers above 0, at…"),
    "a box of nan": Case(TRAIN, box("nan", 1, 9, 9),
        "voc/Annotations/a.xml: the box of object 'red', xmin nan ymin 1 xmax 9 ymax 9, is empty or leaves…"),
    "a box reversed": Case(TRAIN, box(9, 9, 1, 1),
        "voc/Annotations/a.xml: the box of object 'red', xmin 9 ymin 9 xmax 1 ymax 1, is empty or leaves its…"),
    "a box in shares": Case(TRAIN, box(0.1, 0.1, 0.5, 0.5),
        "voc/Annotations/a.xml: the box of object 'red', xmin 0.1 ymin 0.1 xmax 0.5 ymax 0.5, seems to be in…"),
    "a box outside": Case(TRAIN, box(1, 1, 90, 20),
        "voc/Annotations/a.xml: the box of object 'red', xmin 1 ymin 1 xmax 90 ymax 20, is empty or leaves…"),
    "a box in another place": Case(TRAIN, xml(annotation(f"<objects>{OBJECT.format('red', 1, 1, 9, 9)}</objects>")),
        "voc/Annotations/a.xml: 1 objects or boxes lie elsewhere than VOC has them and would be lost;…"),
    "an object without a name": Case(TRAIN, box(1, 1, 9, 9, name=""),
        "voc/Annotations/a.xml: an <object> has no <name>; expected the name of its class"),
    "a polygon": Case(TRAIN, xml(annotation("<object><name>red</name><polygon/></object>")),
        "voc/Annotations/a.xml: object 'red' has no <bndbox> with four numbers <xmin>, <ymin>, <xmax> and <ymax>"),
    "a flag that is none": Case(TRAIN, box(1, 1, 9, 9, name="red</name><difficult>hard</difficult><name>"),
        "voc/Annotations/a.xml: an <object> has <difficult> 'hard'; expected 0 or 1"),
    "no objects to be found": Case(TRAIN, put("voc/Annotations/c.xml", annotation()),
        "voc: voc_test has no object to be found, difficult ones left out, so that no AP can be computed;…"),
    "a misspelt class": Case(TRAIN, put("voc/labels.txt", "red\nbleu\n"),
        "voc/Annotations/a.xml: unknown class 'blue', did you mean 'bleu'? expected one of red, bleu"),
    "a class named twice": Case(TRAIN, put("voc/labels.txt", "red\nred\n"),
        "voc/labels.txt: class 'red' is named twice; leave one of the lines"),
    # lists
    "an id without files": Case(CHECK, put("voc/ImageSets/Main/test.txt", "c\nd\n"), "JPEGImages/d.jpg and 1 more"),
    "an id that leads outside": Case(TRAIN, put("voc/ImageSets/Main/test.txt", "../../c\n"),
        "voc/ImageSets/Main/test.txt: image id '../../c' is a path; expected a file name below JPEGImages/,…"),
    "an id listed twice": Case(CHECK, put("voc/ImageSets/Main/test.txt", "c\nc\n"),
        "ImageSets/Main/test.txt: image id 'c' is listed twice; leave one of the lines"),
    "an empty list": Case(TRAIN, put("voc/ImageSets/Main/test.txt", "\n"),
        "voc/ImageSets/Main/test.txt: empty; expected one image id a line"),
    "a folder as list": Case(TRAIN, folder("voc/ImageSets/Main/test.txt"),
        "voc/ImageSets/Main: lists of trainval found; expected trainval.txt (or train.txt) with test.txt, or…"),
    "a list in UTF-16": Case(TRAIN, put("voc/ImageSets/Main/test.txt", "c\n".encode("utf-16")),
        "voc/ImageSets/Main/test.txt: not text in UTF-8 (invalid start byte at byte 0); save it as UTF-8"),
    "no data": Case(TRAIN.replace("voc", "nowhere"), nothing,
        "nowhere: no such folder; expected the data root, see `make check-datasets`"),
    "a picture as data": Case(CHECK.replace("voc", "good.png"), nothing,
        "good.png: is a file, expected the folder of the data: give DATA=folder"),
    # pictures
    "an empty picture": Case(CHECK, put("voc/JPEGImages/a.jpg", ""), "JPEGImages/a.jpg: empty"),
    "a pointer as picture": Case(f"{CHECK} --deep", put("voc/JPEGImages/a.jpg", LFS),
        "JPEGImages/a.jpg: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
    "a pointer among photographs": Case(f"{LOOK} a.jpg", put("a.jpg", LFS),
        "a.jpg: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull; left out"),
    "a web page among photographs": Case(f"{LOOK} a.jpg", put("a.jpg", PAGE),
        "a.jpg: is a web page, expected the file that its link leads to: fetch that; left out"),
    "a picture beyond the limit": Case(f"{LOOK} a.png", picture("a.png", 20_000, 9_000),
        "a.png: has more than 178,956,970 pixels; expected a smaller picture; left out"),
    "a truncated picture": Case(f"{LOOK} voc/JPEGImages/a.jpg", cut("voc/JPEGImages/a.jpg"),
        "voc/JPEGImages/a.jpg: cannot be read as an image (…); expected a whole JPEG, …; left out"),
    "a pipe among photographs": Case(f"{LOOK} pipes", each(folder("pipes"), lambda: os.mkfifo("pipes/a.jpg")),
        "pipes/a.jpg: is no file; expected a whole JPEG, PNG, GIF, WebP, BMP or TIFF file; left out"),
    "a page as video": Case(f"{LOOK} a.mp4", put("a.mp4", PAGE),
        "a.mp4: cannot be read as a video; expected one of .avi, .m4v, …; left out"),
    "a photograph that is not there": Case(f"{LOOK} nowhere.jpg", nothing,
        "nowhere.jpg: no such file; expected IMAGES to name …"),
    "an empty photograph of a bird": Case(f"{NAME} a.jpg", put("a.jpg", ""),
        "a.jpg: cannot be read as an image (…); expected a whole JPEG, PNG, GIF, WebP, BMP or TIFF file; left out"),
    "a page compared": Case("tools.compare_detectors a.jpg --frcnn run --yolov3 yolo --out out", put("a.jpg", PAGE),
        "a.jpg: is a web page, expected the file that its link leads to: fetch that; left out"),
    "a pointer to propose on": Case("tools.visualize_proposals a.jpg --weights run", put("a.jpg", LFS),
        "a.jpg: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull; left out"),
    "a file as folder of results": Case(f"{LOOK} --out good.png", nothing,
        "good.png: is a file, expected a folder for results: name another one with OUT="),
    "a spoilt list of results": Case(LOOK, put("out/.results.json", "{"),
        "out/.results.json: not a JSON file (…); expected a list of names: delete the file"),
    # weights
    "no weights": Case(f"{PREDICT} nowhere", nothing,
        "nowhere: no such file; expected a run folder or a checkpoint in one, coco, …"),
    "a pointer as weights": Case(f"{PREDICT} run", put(W, LFS),
        "run/model_best.pth: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
    "a page as weights": Case(f"{PREDICT} run", put(W, PAGE),
        "run/model_best.pth: is a web page, expected the file that its link leads to: fetch that"),
    "empty weights": Case(f"{PREDICT} run", put(W, ""),
        "run/model_best.pth: cannot be read as weights (…); expected a whole .pth or .safetensors file"),
    "a text as weights": Case(f"{PREDICT} run", put(W, "weights"),
        "run/model_best.pth: is no whole file of weights, or holds more than tensors and plain values, which…"),
    "weights cut off": Case(f"{PREDICT} run", cut(W),
        "run/model_best.pth: cannot be read as weights (…); expected a whole .pth or .safetensors file"),
    "a folder as weights": Case(f"{PREDICT} run", folder(W),
        "run: holds no model_best.pth; expected the folder of a run that has been evaluated"),
    "a hostile pickle": Case(f"{PREDICT} run", put(W, pickle.dumps(Runs(), 2)),
        "run/model_best.pth: is no whole file of weights, or holds more than tensors and plain values, which…"),
    "a hostile archive": Case(f"{PREDICT} run", weights({"model": {"x": torch.zeros(1)}, "more": Runs()}),
        "run/model_best.pth: is no whole file of weights, or holds more than tensors and plain values, which…"),
    "a hostile model zoo": Case(f"{PREDICT} zoo.pkl",
        put("zoo.pkl", pickle.dumps({"model": Runs(), "__author__": "me"})),
        "zoo.pkl: is a pickle that asks for '….mkdir', which was not run; expected arrays by name alone, as…"),
    "tensors beyond the file": Case(f"{PREDICT} run", safetensors(x=([100], [0, 400])),
        "run/model_best.pth: cannot be read as weights (…); expected a whole .pth or .safetensors file"),
    "tensors over one another": Case(f"{PREDICT} run", safetensors(x=([2], [0, 8]), y=([2], [4, 12])),
        "run/model_best.pth: cannot be read as weights (…); expected a whole .pth or .safetensors file"),
    "a header beyond the file": Case(f"{PREDICT} run", safetensors(2**40),
        "run/model_best.pth: is no whole file of weights, or holds more than tensors and plain values, which…"),
    "no tensors": Case(f"{PREDICT} run", weights({"model": {"x": 1}}),
        "run/model_best.pth: holds no weights; expected names with tensors, by themselves or under 'model'"),
    "another network": Case(f"{PREDICT} run", weights({"model": {"x": torch.zeros(1)}}),
        "run/model_best.pth: does not fit the model: 290 tensors missing (…); 1 tensors unexpected (x, ...);…"),
    "a spoilt configuration of a run": Case(f"{PREDICT} run", put("run/config.yaml", "MODEL: ["),
        "run/config.yaml: is no YAML of keys and values (…)"),
    "a pointer as bird": Case("classification.evaluate bird --data birds", put("bird/model_best.pth", LFS),
        "bird/model_best.pth: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
    "other birds": Case("classification.evaluate bird --data birds", nothing,
        "bird/model_best.pth: knows 7 classes (Bird 0, Bird 1, Bird 2, ...), birds has 5 (Red Bird, Green…"),
    "a detector as bird": Case(f"{NAME} --weights run", nothing,
        "run/model_best.pth: holds no classifier of this project (no model_name among model, ...); expected…"),
    "half a bird": Case(NAME,
        lambda: torch.save({"model_name": "a", "model": {"x": torch.zeros(1)}}, "bird/model_best.pth"),
        "bird/model_best.pth: holds no classifier of this project (no class_names among model_name, model,…"),
    "a pointer to serve": Case("tools.app --frcnn w.pth", put("w.pth", LFS),
        "w.pth: is a pointer of Git LFS, expected the file itself: fetch it with git lfs pull"),
    "a page to start from": Case(f"{START} yolov3.weights", put("yolov3.weights", PAGE),
        "yolov3.weights: is a web page, expected the file that its link leads to: fetch that"),
    "a Darknet cut off": Case(f"{START} a.weights", put("a.weights", DARKNET + bytes(401)),
        "a.weights: 421 bytes are no header and whole values; is the file complete?"),
    "a picture to convert": Case("tools.convert_darknet good.png out.pth", nothing,
        "good.png: is no whole file of weights, or holds more than tensors and plain values, which is never…"),
    # settings
    "no YAML": Case(OWN, put("own.yaml", "SOLVER: ["), "own.yaml: is no YAML of keys and values (…)"),
    "YAML that calls": Case(OWN, put("own.yaml", f"SOLVER: {TAG}"), "own.yaml: is no YAML of keys and values (…)"),
    "YAML of a list": Case(OWN, put("own.yaml", "- 1"), "own.yaml: is no YAML of keys and values (…)"),
    "YAML without end": Case(OWN, put("own.yaml", f"a: {'[' * 1500}"), "own.yaml: is no YAML of keys and values (…)"),
    "a key that is none": Case(OWN, put("own.yaml", "SOLVER: {MAX_ITR: 3}"),
        "own.yaml: 'Non-existent config key: SOLVER.MAX_ITR'; expected the keys of detection/config.py and…"),
    "a value of another type": Case(OWN, put("own.yaml", "SOLVER: {MAX_ITER: many}"),
        "own.yaml: … config key: SOLVER.MAX_ITER; expected the keys of detection/config.py and Detectron2"),
    "a base that names its heir": Case(OWN, each(put("own.yaml", "_BASE_: b.yaml"), put("b.yaml", "_BASE_: own.yaml")),
        "b.yaml: _BASE_ own.yaml: no such file, expected one beside it or in …"),
    "an option without a value": Case(f"{TRAIN} SOLVER.MAX_ITER", nothing,
        "OPTS: 'SOLVER.MAX_ITER' has 1 words; expected pairs of KEY VALUE"),
    "a recipe that is no YAML": Case(RECIPE, put("own.yaml", "lr: ["), "own.yaml data=birds: …; the settings are: …"),
    "a recipe that calls": Case(RECIPE, put("own.yaml", f"lr: {TAG}"), "own.yaml data=birds: …; the settings are: …"),
    "a recipe that is a number": Case(RECIPE, put("own.yaml", "7"), "own.yaml data=birds: …; the settings are: …"),
    "a recipe without end": Case(RECIPE, put("own.yaml", f"lr: {'[' * 1500}"),
        "own.yaml data=birds: …; the settings are: …"),
    "a setting that is none": Case(RECIPE, put("own.yaml", "rate: 3"),
        "own.yaml data=birds: rate: …; the settings are: …"),
    "a setting of another type": Case(RECIPE, put("own.yaml", "milestones: [late]"),
        "own.yaml data=birds: milestones[0]: …; expected another type"),
    "a network that is none": Case(f"{FINETUNE} model=resnet19", nothing,
        "MODEL=resnet19: timm has no such model; did you mean resnet18…"),
    # birds
    "an index that is a page": Case(FINETUNE, put(INDEX, PAGE),
        "birds/CUB_200_2011/images.txt: line 1 is '<!DOCTYPE html>', expected a new number and a value"),
    "a path out of the birds": Case(FINETUNE,
        lambda: put(INDEX, Path(INDEX).read_text().replace("1 001.Red_Bird", "1 ../../x", 1))(),
        "birds/CUB_200_2011/images.txt: image 1 is ../../x/Red_Bird_0000.jpg: expected a path inside images/"),
    "a pointer as bird's photograph": Case(FINETUNE, put(BIRD_PHOTO, LFS),
        "birds/CUB_200_2011/images/001.Red_Bird/Red_Bird_0000.jpg: is a pointer of Git LFS, expected the…"),
    "a bird beyond the limit": Case(FINETUNE, picture(BIRD_PHOTO, 20_000, 9_000),
        "birds/CUB_200_2011/images/001.Red_Bird/Red_Bird_0000.jpg: has more than 178,956,970 pixels;…"),
    "birds to train on alone": Case(FINETUNE.replace("birds", "tree"), picture("tree/train/owl/a.png", 9, 9),
        "tree: train/ without test/ or val/; expected both, each with a folder of images a class"),
    # detections
    "no detections": Case(SCORE, nothing, "boxes.json: No such file or directory; expected a JSON list of …"),
    "JSON without end": Case(SCORE, put("boxes.json", "[" * 100_000),
        "boxes.json: lists within lists without end; expected a JSON list of …"),
    "JSON of 2 GB": Case(SCORE, sparse("boxes.json", 2**31),
        "boxes.json: has more than 1,073,741,824 bytes; expected a JSON list of …"),
    "a page as JSON": Case(SCORE, put("boxes.json", PAGE),
        "boxes.json: not a JSON file (…); expected a JSON list of …"),
    "JSON of another form": Case(SCORE, put("boxes.json", "{}"), "boxes.json: holds {}, expected a JSON list of …"),
    "an image that is none": Case(SCORE, detection(image_id="d"),
        "boxes.json: entry 0 (counted from 0): image_id \"d\" is not in the split, expected one such as \"c\""),
    "a class that is none": Case(SCORE, detection(category="rouge"),
        "boxes.json: entry 0 (counted from 0): category \"rouge\" is unknown, expected one of blue, red"),
    "a score of nan": Case(SCORE, detection(score=float("nan")),
        "boxes.json: entry 0 (counted from 0): score NaN, expected a finite number"),
    "a number beyond all": Case(SCORE, detection(bbox=[10**400, 1, 1, 1]),
        "boxes.json: entry 0 (counted from 0): bbox…"),
    "a box turned inside out": Case(SCORE, detection(bbox=[9, 9, -1, 1]),
        "boxes.json: entry 0 (counted from 0): bbox [9, 9, -1, 1] has a negative size, expected [x, y,…"),
    # archives
    "a page as archive": Case("tools.download_datasets voc2007 --data root --mirror mirror",
        each(*(put(f"mirror/VOC{n}_06-Nov-2007.tar", PAGE) for n in ("trainval", "test"))),
        "mirror/VOCtrainval_06-Nov-2007.tar: the md5 is not c52e279531787c972589f7e41ab4ae64, so what came…"),
}
# fmt: on


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, output: Path) -> Path:
    """A folder in VOC's layout (a and b to train on, c to test on), one in CUB's, a run of each model, a picture."""
    root = tmp_path_factory.mktemp("sound")
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "voc" / name).mkdir(parents=True)
    for seed, name in enumerate("abc"):
        image, objects = draw_scene(48, 64, seed)
        image.save(root / f"voc/JPEGImages/{name}.jpg")
        (root / f"voc/Annotations/{name}.xml").write_text(annotation(*(OBJECT.format(*each) for each in objects)))
    (root / "voc/ImageSets/Main/trainval.txt").write_text("a\nb\n")
    (root / "voc/ImageSets/Main/test.txt").write_text("c\n")
    draw_birds(root / "birds", train=2, test=1)
    for name, run in (("run", FRCNN), ("yolo", YOLOV3), ("bird", BIRD)):
        shutil.copytree(output / run, root / name)
    draw_scene(48, 64, 0)[0].save(root / "good.png")
    return root


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is sound, to be in and to spoil."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2**20}


@pytest.mark.parametrize("name", CASES)
def test_every_bad_input_is_one_line(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, spoil, line = CASES[name]
    spoil()
    before = contents(here)
    module, *words = command.split()
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(module).main()
    assert exit.value.code == 2
    said = capsys.readouterr()
    # The check of data has its table on standard output.
    seen = said.err.splitlines() or re.split(r"\n|  +", said.out)
    expected = re.compile("(error: |warning: |broken: |missing: )?" + ".*".join(map(re.escape, line.split("…"))))
    assert any(expected.fullmatch(each) for each in seen), said
    assert len([each for each in seen if each.startswith("error: ")]) == bool(said.err)
    assert contents(here).items() >= before.items()
    assert not Path("it ran").exists()
    if command.startswith(LOOK) and line.endswith(LEFT_OUT):
        assert Path("out/good.jpg").is_file()  # the others are done
