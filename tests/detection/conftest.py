"""A data set and a network so small that training takes seconds."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import narrow
from tests.detection.runs import NAME

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}
ANNOTATION = """<annotation><size><width>{}</width><height>{}</height><depth>3</depth></size>{}</annotation>"""
OBJECT = """<object><name>{}</name><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""


def draw_image(rng: np.random.Generator, folder: Path, name: str, number: int) -> None:
    """Red and blue rectangles on grey noise; every fifth image is empty, every third upright."""
    height, width = (64, 48) if number % 3 == 0 else (48, 64)
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    objects = ""
    for colour in () if number % 5 == 4 else ("red", "blue")[: 1 + number % 2]:
        (x0, y0), (w, h) = rng.integers(0, 20, 2), rng.integers(14, 28, 2)
        image[y0 : y0 + h, x0 : x0 + w] = COLOURS[colour]
        objects += OBJECT.format(colour, x0 + 1, y0 + 1, x0 + w, y0 + h)
    Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
    (folder / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(width, height, objects))


@pytest.fixture(scope="session")
def voc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in VOC layout: classes red and blue, 10 images to train on, 4 to test on."""
    folder = tmp_path_factory.mktemp("tiny voc")  # with a space, as a user's folder may have
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    (folder / "labels.txt").write_text("red\nblue\n")
    rng = np.random.default_rng(0)
    for split, count in (("trainval", 10), ("test", 4)):
        names = [f"{split}_{number}" for number in range(count)]
        for number, name in enumerate(names):
            draw_image(rng, folder, name, number)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_opts() -> list[str]:
    """Options that shrink either recipe of Faster R-CNN to a very narrow ResNet-50 on 64-pixel images."""
    options = {
        **narrow.FASTER_RCNN,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "INPUT.MIN_SIZE_TRAIN": (48, 64),
        "INPUT.MIN_SIZE_TEST": 64,
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.WEIGHT_DECAY": 0.0001,
        "SOLVER.WEIGHT_DECAY_BIAS": None,
        "SOLVER.MAX_ITER": 12,
        "SOLVER.STEPS": (9,),
        "SOLVER.WARMUP_ITERS": 3,
        "SOLVER.CHECKPOINT_PERIOD": 2,
        "SOLVER.LOG_PERIOD": 3,
        "SOLVER.EMA_DECAY": 0.9,
        "TEST.EVAL_PERIOD": 5,
        "TEST.VALIDATION_LOSS_IMAGES": 4,
    }
    return [str(word) for pair in options.items() for word in pair]


class Detector:
    """The command line of `detection.train_net` with the tiny folder and network."""

    def __init__(self, server, data: Path, opts: list[str], output: Path) -> None:
        self.server, self.data, self.opts, self.output = server, data, opts, output

    def arguments(self, output: str, *flags: str, opts: tuple[str, ...] = ()) -> list[str]:
        """What is given for a run into the folder `output`; flags and options given later count."""
        words = ["detection.train_net", "--data", str(self.data), "--pretrained", "0"]
        return [*words, "--output", str(self.output / output), *flags, *self.opts, *opts]

    def __call__(self, output: str, *flags: str, opts: tuple[str, ...] = ()) -> tuple[int, str]:
        """Trains a new run; the exit code and what was printed."""
        return self.server(*self.arguments(output, *flags, opts=opts))

    def later(self, output: str, *flags: str, opts: tuple[str, ...] = ()) -> tuple[int, str]:
        """Resumes or evaluates a run, with no more than the options given here."""
        return self.server("detection.train_net", "--output", str(self.output / output), *flags, *opts)


@pytest.fixture(scope="session")
def detector(fork_server, voc_folder: Path, tiny_opts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Detector:
    return Detector(fork_server, voc_folder, tiny_opts, tmp_path_factory.mktemp("detectors"))


@pytest.fixture(scope="session")
def trained(detector: Detector) -> Path:
    """The run folder of a training that nothing disturbed; not to be changed."""
    code, printed = detector("undisturbed")
    assert code == 0, printed
    return detector.output / "undisturbed" / NAME


@pytest.fixture
def copied(detector, trained: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the finished run, 12 iterations long, in an output folder named after the test."""
    run = detector.output / request.node.name / NAME
    shutil.copytree(trained, run)
    return run
