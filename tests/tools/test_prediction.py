"""Trained models in Python: images in any form, one or many, and what happens to those that are none."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import classification
import detection
from common.errors import UserError
from common.prediction import Prediction, Predictor, as_pixels
from common.threads import available_cores
from tests.tools.scenes import draw_scene

ROOT = Path(__file__).resolve().parents[2]
LOAD = {
    "faster_rcnn_R_50_FPN-sample": detection.load,
    "yolov3_darknet53_study": detection.load,
    "resnet18-best-2": classification.load,
}


def assert_same(first: Prediction, second: Prediction) -> None:
    assert first.names == second.names
    np.testing.assert_allclose(first.scores, second.scores, rtol=1e-5)
    if first.boxes is not None:
        np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-2)


@pytest.mark.parametrize("run", LOAD)
def test_an_image_is_the_same_in_every_form(run, output, tmp_path):
    model = LOAD[run](output / run)
    image, _ = draw_scene(48, 64, 0)
    path = tmp_path / "a.png"
    image.save(path)
    pixels = np.asarray(image)
    forms = [path, str(path), image, pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)]
    first = model.predict(path, score=0)
    assert len(first) > 0
    assert first.scores.tolist() == sorted(first.scores, reverse=True)
    assert first.boxes is None or first.boxes.shape == (len(first), 4)
    for form in forms[1:]:
        assert_same(model.predict(form, score=0), first)
    for prediction in model.predict(forms, score=0):
        assert_same(prediction, first)
    assert model.predict([]) == []
    # Less is told of where more is asked for; a detector tells of what is likely.
    middle = float(np.median(first.scores))
    above = model.predict(path, score=middle)
    assert len(above) == sum(score >= middle for score in first.scores)
    assert len(model.predict(path)) == sum(score >= (0.5 if first.boxes is not None else 0) for score in first.scores)


def test_a_run_folder_and_its_file_are_the_same_model(output):
    image, _ = draw_scene(48, 64, 1)
    for run, load in LOAD.items():
        assert_same(load(output / run).predict(image, 0), load(str(output / run / "model_best.pth")).predict(image, 0))


def test_grey_and_turned_images_become_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert as_pixels(grey).tolist() == [grey.tolist()] * 3
    image = Image.fromarray(grey)
    image.getexif()[0x0112] = 6  # to be turned to the right
    assert as_pixels(image)[0].tolist() == np.rot90(grey, -1).tolist()
    assert as_pixels(Image.fromarray(grey * np.uint16(257))).tolist() == [grey.tolist()] * 3


def test_mirrored_arrays_are_taken():
    """As a frame of OpenCV's becomes RGB."""
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    for mirrored in (pixels[..., ::-1], pixels[::-1], pixels[:, ::-1, 0]):
        channels = mirrored.transpose(2, 0, 1) if mirrored.ndim == 3 else [mirrored] * 3
        assert as_pixels(mirrored).tolist() == [channel.tolist() for channel in channels]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        np.zeros((4, 4, 3), ">u2"),  # as astronomers have them
        np.array([["a"]], dtype=object),
    ],
)
def test_arrays_that_are_no_image_are_refused(image):
    with pytest.raises(UserError, match=r"expected uint8, an array \(H, W, 3\)"):
        as_pixels(image)
    with pytest.raises(UserError, match=r"^image: its pixels have 32 bits"):
        as_pixels(Image.new("F", (4, 4)))


def test_a_picture_that_is_cut_off_is_refused(tmp_path):
    image, _ = draw_scene(48, 64, 0)
    image.save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:700])
    with Image.open(tmp_path / "a.jpg") as picture, pytest.raises(UserError, match=r"^image: .*truncated"):
        as_pixels(picture)


def test_a_stream_leaves_the_threads_of_others_alone():
    """What is read is prepared by threads that compute alone, and torch would make that the rule for all to come."""
    threads, heard = torch.get_num_threads(), []

    def compute() -> None:
        heard.append(torch.get_num_threads())

    class Alone(Sides):
        def prepare(self, pixels: torch.Tensor) -> dict:
            compute()
            return super().prepare(pixels)

    torch.set_num_threads(3)
    try:
        Alone().predict([np.zeros((3, 5), np.uint8)] * 20)
        assert heard == [1] * 20
        later = threading.Thread(target=compute)
        later.start()
        later.join()
        assert heard.pop() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


class Sides(Predictor):
    """Says how wide an image is; runs out of memory with more than two."""

    batch_size = 4
    min_score = 0.0

    def __init__(self) -> None:
        self.class_names = ["width"]
        self.seen: list[list[int]] = []

    def prepare(self, pixels: torch.Tensor) -> dict:
        if pixels.shape[2] == 13:
            raise RuntimeError("thirteen")
        return {"width": pixels.shape[2]}

    def size_of(self, sample: dict) -> int:
        return sample["width"]

    def run(self, samples: list[dict]) -> list[Prediction]:
        if len(samples) > 2:
            raise torch.OutOfMemoryError
        self.seen.append([sample["width"] for sample in samples])
        return [Prediction(["width"], np.array([sample["width"] / 100])) for sample in samples]


def test_images_of_one_size_run_together_and_all_are_told_of(tmp_path):
    widths = [*np.random.default_rng(0).choice([5, 6, 7], 50).tolist(), *range(20, 70)]  # the last are all unlike
    model = Sides()
    taken: list[int] = []

    def images():
        for number, width in enumerate(widths):
            taken.append(number)
            yield np.zeros((3, width), np.uint8)

    seen = []
    for each in model.stream(images(), keep=lambda pixels: pixels.shape[2]):
        seen.append(each)
        # What is read ahead and what waits for others of its size do not grow.
        assert len(taken) - len(seen) < 6 * model.batch_size + available_cores()
    assert sorted(each.place for each in seen) == list(range(100))
    for place, kept, prediction in seen:
        assert kept == widths[place] == round(100 * prediction.scores[0])
    assert all(len(set(batch)) == 1 for batch in model.seen)
    assert max(map(len, model.seen)) == 2  # what is too large for the memory comes in halves
    assert sum(map(len, model.seen)) == 100


def test_one_image_that_the_memory_cannot_hold_is_an_error():
    class Never(Sides):
        def run(self, samples):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Never().predict(np.zeros((3, 5), np.uint8))


def test_what_cannot_be_prepared_is_named(tmp_path):
    files = [tmp_path / f"{width}.png" for width in (5, 13, 6)]
    for file in files:
        Image.new("L", (int(file.stem), 3)).save(file)
    with pytest.raises(UserError, match=r"13\.png: cannot be prepared for the network \(thirteen\)"):
        Sides().predict(files)
    left_out = []
    seen = list(Sides().stream([*files, tmp_path / "none.png"], leave_out=lambda error: left_out.append(str(error))))
    assert sorted(each.place for each in seen) == [0, 2]
    assert [Path(line.partition(": ")[0]).name for line in left_out] == ["13.png", "none.png"]


def test_the_packages_are_cheap_to_import():
    program = "import sys, detection, classification; print(sorted({'torch', 'detectron2', 'timm'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_of_the_readme(output, tmp_path, monkeypatch, capsys):
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "output").symlink_to(output)
    draw_scene(48, 64, 0)[0].save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    printed = []
    for example in examples:
        # Untrained networks are modest.
        exec(compile(example.replace("score=0.5", "score=0.15"), "README.md", "exec"), {})
        printed.append(capsys.readouterr().out.splitlines())
    objects, birds = printed
    assert len(objects) > 0
    assert all(re.fullmatch(r"(red|blue) 0\.\d+ \[.*\]", line) for line in objects)
    assert len(birds) == 2 and birds[0] == birds[1] and birds[0].count("Bird ") == 5
