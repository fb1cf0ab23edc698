"""Without what Linux alone has, everything imports and trains in one process; loading processes may be spawned."""

import os
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from PIL import Image
from torch.utils.data import DataLoader

from common.run_folder import read_metrics
from detection.config import CONFIGS, get_cfg, merge_file, merge_options
from detection.data_loader import build_test_loader, build_training_loader
from detection.voc import register_voc

ROOT = Path(__file__).resolve().parents[2]

# Libraries first: they are installed for the machine that is here.
ELSEWHERE = """
import os, pkgutil, signal, sys
import detectron2.engine, detectron2.evaluation, detectron2.modeling, huggingface_hub, matplotlib.figure, pandas, psutil
import timm, timm.data, timm.optim, torch, torch.distributed.run, torch.utils.tensorboard, torchvision, tqdm
sys.platform = os.environ["PRETENDED"]
del os.sched_getaffinity, os.memfd_create
if sys.platform == "win32":
    del signal.SIGKILL, os.fork
import importlib
import classification, common, detection
for package in (common, classification, detection):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
import classification.train, detection.train_net
for module, separator in ((detection.train_net, "birds"), (classification.train, None)):
    words = sys.argv[1:]
    at = words.index("birds")
    sys.argv = [sys.argv[0], *(words[:at] if separator else words[at + 1:])]
    module.main()
    sys.argv[1:] = words
"""


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root in CUB's layout: two classes of one colour each."""
    root = tmp_path_factory.mktemp("birds")
    folder = root / "CUB_200_2011"
    names = [f"00{1 + number // 4}.Bird_{number // 4}/{number}.jpg" for number in range(8)]
    for number, name in enumerate(names):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((40, 40, 3), 60 + 120 * (number // 4), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    tables = {
        "images": names,
        "image_class_labels": [1 + number // 4 for number in range(8)],
        "train_test_split": [int(number % 4 < 3) for number in range(8)],
        "classes": ["001.Bird_0", "002.Bird_1"],
    }
    for table, values in tables.items():
        (folder / f"{table}.txt").write_text("".join(f"{row} {value}\n" for row, value in enumerate(values, start=1)))
    return root


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_both_halves_train_elsewhere(
    platform: str, voc_folder: Path, birds: Path, tiny_opts: list[str], tmp_path: Path
) -> None:
    detector = ["--data", str(voc_folder), "--pretrained", "0", "--output", str(tmp_path / "detector"), *tiny_opts]
    settings = ["model=test_resnet", "pretrained=0", "image_size=32", "batch_size=2", "epochs=1", "lr=0.05"]
    classifier = ["study", *settings, f"data={birds}", "--output", str(tmp_path / "classifier")]
    words = [*detector, "SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0", "birds", *classifier]
    finished = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PRETENDED": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for half in ("detector", "classifier"):
        (run,) = (tmp_path / half).iterdir()
        assert read_metrics(run)
        assert (run / "model_best.pth").exists()


def tiny_cfg(leaf: str, tiny_opts: list[str]) -> CfgNode:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{leaf}.yaml")
    if "yolov3" in leaf:
        small = "INPUT.SQUARE_SIZES_TRAIN [32,64] INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 4 INPUT.MOSAIC_PROB 0.5"
        merge_options(cfg, [*small.split(), "SOLVER.MAX_ITER", "8", "INPUT.CLOSE_ITERS", "2"])
    else:
        merge_options(cfg, tiny_opts)
    cfg.TEST.IMS_PER_BATCH, cfg.MODEL.DEVICE = 2, "cpu"
    return cfg


def same(one: object, two: object) -> bool:
    """Whether two samples, or lists of them, are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if hasattr(one, "get_fields"):
        return same(one.get_fields(), two.get_fields())
    if hasattr(one, "tensor"):
        return torch.equal(one.tensor, two.tensor)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("leaf", ["faster_rcnn_R_50_FPN", "yolov3_darknet53"])
def test_what_a_loading_process_needs_can_be_sent_to_it(leaf: str, voc_folder: Path, tiny_opts: list[str]) -> None:
    cfg = tiny_cfg(leaf, tiny_opts)
    register_voc(voc_folder)
    train = build_training_loader(cfg, DatasetCatalog.get("voc_trainval"), range(4))
    test = build_test_loader(cfg, DatasetCatalog.get("voc_test"), with_annotations=True)
    for loader in (train.loader, test.loader):
        sent = pickle.loads(ForkingPickler.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        copied = DataLoader(sent[0], batch_sampler=loader.batch_sampler, collate_fn=sent[1], worker_init_fn=sent[2])
        expected = list(loader)
        assert len(expected) > 1
        assert same(list(copied), expected)


def test_spawned_loading_process_gives_the_same_batches(voc_folder: Path, tiny_opts: list[str]) -> None:
    register_voc(voc_folder)
    cfg = tiny_cfg("yolov3_darknet53", tiny_opts)
    loader = build_training_loader(cfg, DatasetCatalog.get("voc_trainval"), range(8)).loader
    expected = list(loader)
    spawned = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        num_workers=1,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context="spawn",
    )
    assert same(list(spawned), expected)
    assert not same(expected[0], expected[1])
