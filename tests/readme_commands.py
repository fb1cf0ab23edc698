"""Every `make` command of the README, in the README's own spelling, in a copy of the checkout with short settings.

`make test` by itself does not collect this file, which takes many minutes: `make test TESTS=tests/readme_commands.py`.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from detection.classes import COCO_CLASSES
from detection.modeling import build_model
from detection.starts import read_leaf, set_classes
from detection.yolov3.darknet_weights import write_darknet_weights

ROOT = Path(__file__).resolve().parent.parent

# Where those are run that cannot be run here.
ELSEWHERE = {
    "make test": "is what runs this",
    "make app": "a server: tests/tools/test_app.py",
    "make lock": "needs the package registry",
    "NNODES=2": "needs two machines: tests/detection/test_train_net.py trains two nodes on loopback",
}
# Without network these end with one line that says what to do, and exit code 2.
OFFLINE = {
    "make datasets": "datasets/README.md",
    "make check-datasets": "make datasets",
    "make study": "make datasets",
    "make study PLAN=1": "make datasets",
    'make study SEEDS="0 1 2" START=coco': "make datasets",
    "make study STUDY=docs/ablation.yaml PLAN=1": "make datasets",
    "make finetune DATA=path/to/birds": "PRETRAINED=0",
    "make train-frcnn START=imagenet": "the configuration of the drawn sample names no weights",
    "make train-frcnn START=fasterrcnn_resnet50_fpn_v2": "START=random",
    "make train-yolov3 START=coco": "START=random",
    "make eval-yolov3 START=coco DATA=path/to/folder": "START=path",
    "make predict START=coco MODEL=yolov3 IMAGES=photo.jpg": "START=path",
}
# (file, pattern, replacement): fewer pictures, fewer steps, smaller images; nothing else differs from the checkout.
SHORT = [
    ("common/sample/cub.py", r"_TRAIN_PICTURES = 12, 8", "_TRAIN_PICTURES = 2, 1"),
    ("common/sample/voc.py", r'("(?:train|val|test)"): \((?:80|100), [12]\)', r"\1: (16, 1)"),
    ("detection/configs/Sample-faster_rcnn.yaml", r"MAX_EPOCHS: .*", "MAX_EPOCHS: 1.0"),
    ("detection/configs/Sample-faster_rcnn.yaml", r"WARMUP_EPOCHS: .*", "WARMUP_EPOCHS: 0.5"),
    ("detection/configs/Sample-yolov3.yaml", r"MAX_EPOCHS: .*", "MAX_EPOCHS: 1.0"),
    ("detection/configs/Sample-yolov3.yaml", r"WARMUP_ITERS: .*", "WARMUP_ITERS: 2"),
    ("detection/configs/faster_rcnn_R_50_FPN_small.yaml", r"MAX_EPOCHS: .*", "MAX_EPOCHS: 1.0"),
    ("detection/configs/yolov3_darknet53_small.yaml", r"MAX_EPOCHS: .*", "MAX_EPOCHS: 1.0"),
    ("detection/configs/yolov3_tiny_coco.yaml", r"MAX_EPOCHS: .*", "MAX_EPOCHS: 1.0"),
    ("classification/recipes/study.yaml", r"image_size: .*", "image_size: 32"),
    ("classification/recipes/study.yaml", r"(?m)^model: .*", "model: resnet10t\\npretrained: false"),
    ("classification/recipes/sample.yaml", r"image_size: .*", "image_size: 32"),
    ("classification/recipes/sample.yaml", r"(?m)^epochs: .*", "epochs: 1"),
    ("classification/recipes/sample.yaml", r"batch_size: .*", "batch_size: 100"),
]


def commands() -> list[str]:
    """The lines of the README's code blocks that begin with make, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [re.split(r"\s+#", line)[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith("make ")))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows or would know, made short, and the user's own files that the README speaks of."""
    copy = tmp_path_factory.mktemp("a user's") / "checkout"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for name, pattern, replacement in SHORT:
        text, count = re.subn(pattern, replacement, (copy / name).read_text())
        assert count, f"{name}: nothing matches {pattern}"
        (copy / name).write_text(text)
    subprocess.run(["make", "sample-data"], cwd=copy, env=environment(), check=True)
    voc = copy / "datasets" / "sample" / "VOC2007"
    shutil.copytree(voc, copy / "path" / "to" / "folder")
    (copy / "path/to/folder/ImageSets/Main/val.txt").unlink()
    pictures = sorted((voc / "JPEGImages").iterdir())
    shutil.copy(pictures[0], copy / "photo.jpg")
    (copy / "folder").mkdir()
    shutil.copy(pictures[1], copy / "folder")
    write_files_of_the_user(copy)
    image_id = (voc / "ImageSets" / "Main" / "test.txt").read_text().split()[0]
    (copy / "boxes.json").write_text(
        f'[{{"image_id": "{image_id}", "category": "dog", "bbox": [1, 2, 30, 40], "score": 0.9}}]'
    )
    return copy


def write_files_of_the_user(copy: Path) -> None:
    """What the README's commands name beside the data: settings, folders of other forms, and random weights."""
    (copy / "birds.yaml").write_text("model: resnet10t\npretrained: false\nimage_size: 32\nepochs: 1\n")
    (copy / "boxes.yaml").write_text(
        "_BASE_: faster_rcnn_R_50_FPN.yaml\nMODEL:\n  WEIGHTS: ''\n"
        "INPUT:\n  MIN_SIZE_TRAIN: [96]\n  MIN_SIZE_TEST: 96\nSOLVER:\n  MAX_ITER: 2\n"
    )
    photographs = sorted((copy / "datasets/sample/CUB_200_2011/images").glob("*/*.jpg"))
    for part, number in (("train", 0), ("test", 1)):
        for name in ("robin", "wren"):
            folder = copy / "path/to/birds" / part / name
            folder.mkdir(parents=True)
            shutil.copy(photographs[number], folder)
    yolo, coco = copy / "yolo-folder", copy / "photos"
    for folder in (yolo / "images/train", yolo / "labels/train", coco):
        folder.mkdir(parents=True)
    (yolo / "classes.txt").write_text("dog\n")
    (yolo / "labels/train/a.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    shutil.copy(photographs[0], yolo / "images/train/a.jpg")
    for number, split in enumerate(("train", "val")):
        shutil.copy(photographs[number], coco / f"{split}.jpg")
        width, height = Image.open(photographs[number]).size
        picture = {"id": 1, "file_name": f"{split}.jpg", "height": height, "width": width}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 8, 9], "iscrowd": 0}
        whole = {"images": [picture], "annotations": [box], "categories": [{"id": 1, "name": "dog"}]}
        (copy / f"{split}.json").write_text(json.dumps(whole))

    (copy / "weights").mkdir()
    backbone = "tf_efficientnet_lite0"
    torch.save(timm.create_model(backbone).state_dict(), copy / "weights" / f"{backbone}.pth")
    write_darknet_weights(copy / "yolov3-tiny.weights", of_coco("yolov3_tiny_coco"))
    zoo = of_coco("faster_rcnn_R_50_FPN_zoo").state_dict()
    file = {"model": {name: value.numpy() for name, value in zoo.items()}, "__author__": "Detectron2 Model Zoo"}
    (copy / "model_final.pkl").write_bytes(pickle.dumps(file))


def of_coco(leaf: str) -> nn.Module:
    """A detector of COCO's classes with random weights."""
    cfg = read_leaf(leaf)
    set_classes(cfg, list(COCO_CLASSES))
    return build_model(cfg)


def environment() -> dict[str, str]:
    """With the packages of this environment, one thread, and no way to the network for what asks for it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PYTHON": sys.executable, "PATH": path, "OMP_NUM_THREADS": "1"}
    offline = {"MIRROR": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TESTS")  # what a make around this hands down
    return {**{name: value for name, value in os.environ.items() if name not in outer}, **own, **offline}


@pytest.mark.parametrize("command", commands())
def test_command(command: str, checkout: Path) -> None:
    for part, where in ELSEWHERE.items():
        if part in command:
            pytest.skip(where)
    done = subprocess.run(command, shell=True, cwd=checkout, env=environment(), capture_output=True, text=True)
    if command in OFFLINE:
        assert done.returncode == 2
        assert OFFLINE[command] in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
