"""Very small untrained models in run folders, and a browser to look at pages with."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, sync_playwright

from classification import model as classification
from classification.recipe import Recipe, save_recipe
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from tests.tools.scenes import COLOURS
from tools.report.document import BROWSERS

SMALL = {
    "faster_rcnn_R_50_FPN": {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[20], [24], [28], [32], [32]],
        "MODEL.RPN.NMS_THRESH": 0.9,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.8,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.1,
    },
    "yolov3_tiny": {
        "MODEL.YOLOV3.CONV_DIMS": [16, 32],
        "MODEL.YOLOV3.ANCHORS": [[[20, 20], [24, 20], [28, 24]], [[20, 28], [24, 28], [28, 28]]],
        "MODEL.YOLOV3.SCORE_THRESH_TEST": 0.1,
    },
}


@pytest.fixture(scope="session")
def make_detector() -> Callable[[Path, str, list[str], Path], Path]:
    """Makes a run folder for a configuration, classes and data: random weights whose predictions are far from even."""

    def make(run: Path, config: str, classes: list[str], data: Path) -> Path:
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / f"{config}.yaml")
        cfg.merge_from_list([word for pair in SMALL[config].items() for word in pair])
        common = {"MODEL.DEVICE": "cpu", "INPUT.MIN_SIZE_TEST": 64, "TEST.DETECTIONS_PER_IMAGE": 120}
        cfg.merge_from_list([word for pair in common.items() for word in pair] + ["DATALOADER.NUM_WORKERS", 0])
        cfg.MODEL.CLASSES = classes
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.YOLOV3.NUM_CLASSES = len(classes)
        cfg.DATASETS.ROOT, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = str(data), ("voc_trainval",), ("voc_test",)
        torch.manual_seed(0)
        model = build_model(cfg)
        for name, weight in model.named_parameters():
            if name.endswith("cls_score.weight"):
                torch.nn.init.normal_(weight, std=0.02)
            elif name.endswith("prediction.weight"):
                torch.nn.init.normal_(weight, std=0.5)
            elif name.endswith("prediction.bias"):
                torch.nn.init.zeros_(weight)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, run / "model_best.pth")
        return run / "model_best.pth"

    return make


@pytest.fixture(scope="session")
def make_classifier() -> Callable[[Path, list[str]], Path]:
    """Makes the run folder of a classifier of these species that sees 32 pixels."""

    def make(run: Path, species: list[str]) -> Path:
        torch.manual_seed(0)
        model = classification.build_model("test_resnet", len(species))
        card = classification.describe("test_resnet", model, species, 32, 0.8)
        run.mkdir(parents=True)
        save_recipe(Recipe(model="test_resnet"), run / "config.yaml")
        torch.save({**card, "model": model.state_dict()}, run / "model_best.pth")
        return run / "model_best.pth"

    return make


@pytest.fixture(scope="session")
def output(tmp_path_factory, make_detector, make_classifier) -> Path:
    """A folder of runs, one of each model, named as training names them; seven birds, "Bird 0" to "Bird 6"."""
    output = tmp_path_factory.mktemp("all runs")
    make_detector(output / "faster_rcnn_R_50_FPN-sample", "faster_rcnn_R_50_FPN", list(COLOURS), output)
    make_detector(output / "yolov3_darknet53_study", "yolov3_tiny", list(COLOURS), output)
    make_classifier(output / "resnet18-best-2", [f"Bird {number}" for number in range(7)])
    return output


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium that reaches nothing by itself."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(BROWSERS)} is installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-gpu"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=[*quiet, "--no-first-run"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page; at the end nothing may have gone wrong in it, and nothing been asked of another machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if is_local(request.url) else wrong.append(f"asked for {request.url}"))
    yield page
    context.close()
    assert not wrong


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:"))
