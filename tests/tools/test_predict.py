"""The command on very small untrained models, against what the models say when asked directly."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from classification.predict import BirdClassifier, newest_classifier
from common.images import read_image
from detection.dataset_mapper import DatasetMapper
from detection.modeling import load_detector
from detection.voc import load_voc_instances
from detection.voc_annotations import annotation_xml
from tests.tools.scenes import draw_scene
from tools import video
from tools.eval_detections import read_detections
from tools.predict import main

FRCNN, YOLOV3, BIRD = "faster_rcnn_R_50_FPN-sample", "yolov3_darknet53_study", "resnet18-best-2"  # runs of `output`
CLASSES = ["red", "blue"]
SCORE = 0.15  # untrained networks are modest
SPECIES = [f"Bird {number}" for number in range(7)]


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three photographs of rectangles, upright and lying, in a folder with a file that is none."""
    folder = tmp_path / "my photographs"
    folder.mkdir()
    for number, (height, width) in enumerate([(48, 64), (64, 48), (50, 61)]):
        draw_scene(height, width, number)[0].save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(*words: object) -> list[dict]:
    """Entries of predictions.json after the command."""
    words = [str(word) for word in words]
    main(words)
    return json.loads((Path(words[words.index("--out") + 1]) / "predictions.json").read_text())


def score_of(name: str, score: float = SCORE) -> list[object]:
    """The words that ask a detector for what has this score."""
    return [] if name == BIRD else ["--score", score]


def results(folder: Path) -> list[str]:
    """Names of the files of results, without the hidden list of them."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def ends_with_error(*words: object) -> None:
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    assert exit.value.code == 2


def asked_directly(weights: Path, path: Path) -> list[tuple[int, float, list[float]]]:
    """Category from 1, score, and corners of the boxes, best first."""
    cfg, model = load_detector(weights)
    with torch.inference_mode():
        found = model([DatasetMapper(cfg, False)({"file_name": str(path)})])[0]["instances"]
    rows = zip(found.pred_classes.tolist(), found.scores.tolist(), found.pred_boxes.tensor.tolist(), strict=True)
    return sorted(((label + 1, score, box) for label, score, box in rows), key=lambda row: -row[1])


def test_the_best_score_is_that_of_the_evaluation_beside_the_weights(output, photographs, tmp_path, capsys):
    weights = shutil.copytree(output / YOLOV3, tmp_path / "run") / "model_best.pth"
    words = [photographs / "0.png", "--weights", weights, "--out", tmp_path / "out", "--score", "best"]
    ends_with_error(*words)
    assert "evaluation.json: no such file" in capsys.readouterr().err
    scores = [score for _, score, _ in asked_directly(weights, photographs / "0.png")]
    threshold = (scores[2] + scores[3]) / 2
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"threshold": threshold}))
    assert [entry["score"] for entry in run(*words)] == pytest.approx(scores[:3])


@pytest.mark.parametrize("name", [FRCNN, YOLOV3])
def test_detector_says_what_its_model_says(name, output, photographs, tmp_path, capsys):
    entries = run(photographs, "--weights", output / name, "--out", tmp_path / "out", "--score", SCORE)
    for path in sorted(photographs.glob("*.png")):
        expected = [row for row in asked_directly(output / name / "model_best.pth", path) if row[1] >= SCORE]
        found = [entry for entry in entries if entry["image_id"] == path.stem]
        assert expected
        assert [entry["category_id"] for entry in found] == [label for label, _, _ in expected]
        assert [CLASSES.index(entry["category"]) + 1 for entry in found] == [label for label, _, _ in expected]
        assert [entry["score"] for entry in found] == pytest.approx([score for _, score, _ in expected])
        xywh = np.array([entry["bbox"] for entry in found])
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(corners, [box for _, _, box in expected], atol=0.011)
    assert f"{len(entries)} predictions on 3 files" in capsys.readouterr().out
    assert {entry["image_id"] for entry in entries} == {"0", "1", "2"}
    # The evaluation reads the file as it is.
    detections = read_detections(
        tmp_path / "out" / "predictions.json", [{"image_id": str(number)} for number in range(3)], CLASSES
    )
    assert len(detections.score) == len(entries)


def test_pictures_are_the_photographs_with_what_was_found(output, photographs, tmp_path):
    arguments = [photographs, "--weights", output / FRCNN / "model_best.pth"]
    assert not run(*arguments, "--out", tmp_path / "nothing", "--score", 1)
    entries = run(*arguments, "--out", tmp_path / "boxes", "--score", SCORE)
    for path in photographs.glob("*.png"):
        photograph = Image.open(path).convert("RGB")
        plain, drawn = (Image.open(tmp_path / name / f"{path.stem}.jpg") for name in ("nothing", "boxes"))
        scale = 640 / max(photograph.size)
        assert plain.size == drawn.size == tuple(round(scale * length) for length in photograph.size)
        # Without objects nothing but the photograph is there, to its edges.
        small = np.asarray(plain.resize(photograph.size, Image.Resampling.BOX), dtype=float)
        assert np.abs(small - np.asarray(photograph, dtype=float)).mean() < 6
        # With objects the upper edge of each box has the colour of a class.
        changed = np.abs(np.asarray(plain, dtype=float) - np.asarray(drawn, dtype=float)).max(2) > 40
        for x, y, width, _ in (entry["bbox"] for entry in entries if entry["image_id"] == path.stem):
            row, column = round(scale * y), round(scale * (x + width / 2))
            assert changed[max(row - 3, 0) : row + 4, column].any()


def test_voc_xml_is_read_back(output, photographs, tmp_path):
    out = tmp_path / "out"
    entries = run(photographs, "--weights", output / YOLOV3, "--out", out, "--score", SCORE, "--voc-xml")
    shutil.copytree(photographs, out / "JPEGImages")
    (out / "ImageSets/Main").mkdir(parents=True)
    (out / "ImageSets/Main/test.txt").write_text("0\n1\n2\n")
    assert entries
    records = load_voc_instances(out, "test", CLASSES)
    assert [(record["height"], record["width"]) for record in records] == [(48, 64), (64, 48), (50, 61)]
    for record in records:
        wanted = [entry for entry in entries if entry["image_id"] == record["image_id"]]
        found = record["annotations"]
        assert [annotation["category_id"] + 1 for annotation in found] == [entry["category_id"] for entry in wanted]
        for annotation, entry in zip(found, wanted, strict=True):
            x, y, width, height = entry["bbox"]
            tolerance = 0.02 if min(width, height) >= 1 else 1  # less than a pixel becomes a whole one
            np.testing.assert_allclose(annotation["bbox"], [x, y, x + width, y + height], atol=tolerance)


def test_voc_boxes_keep_a_pixel_inside_the_image(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    boxes = [(0.0, 0.0, 10.0, 8.0), (2.6, 3.4, 2.7, 3.4), (9.8, 7.9, 10.0, 8.0)]
    text = annotation_xml("a & b.jpg", 8, 10, [("<cat>", box) for box in boxes])
    assert "<xmin>1</xmin>" in text.replace("\n", "")
    (tmp_path / "Annotations/a.xml").write_text(text)
    (tmp_path / "JPEGImages/a.jpg").touch()
    (tmp_path / "ImageSets/Main/test.txt").write_text("a\n")
    (record,) = load_voc_instances(tmp_path, "test", ["<cat>"])
    found = [annotation["bbox"] for annotation in record["annotations"]]
    expected = [[0, 0, 10, 8], [2.6, 3.4, 3.6, 4.4], [9, 7, 10, 8]]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_classifier_names_five_species(output, photographs, tmp_path):
    entries = run(photographs / "0.png", "--weights", output / BIRD, "--out", tmp_path / "out")
    classifier = BirdClassifier(output / BIRD / "model_best.pth")
    probabilities = classifier.probabilities(classifier.cut_out(read_image(photographs / "0.png"))[None])[0]
    order = probabilities.argsort(descending=True)[:5]
    assert [entry["category_id"] - 1 for entry in entries] == order.tolist()
    assert [entry["category"] for entry in entries] == [SPECIES[label] for label in order]
    assert [entry["score"] for entry in entries] == pytest.approx(probabilities[order].tolist(), abs=1e-6)
    assert all(entry["image_id"] == "0" and "bbox" not in entry for entry in entries)
    picture = np.asarray(Image.open(tmp_path / "out" / "0.jpg"), dtype=int)
    assert picture.shape[1] == 640 + 400 + 3 * 10
    assert (picture[:, 10:650] == (120, 120, 120)).all(2).mean() > 0.2  # the photograph is on the left
    assert (picture[:, 660:] > 250).all(2).mean() > 0.5  # and bars on white on the right


def test_patterns_and_equal_names(output, photographs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(photographs / "1.png", other / "0.png")
    entries = run(f"{photographs}/[0]*.png", f"{other}/*.png", "--weights", output / BIRD, "--out", tmp_path / "out")
    assert sorted({entry["image_id"] for entry in entries}) == ["0", "0-2"]
    assert results(tmp_path / "out") == ["0-2.jpg", "0.jpg", "predictions.json"]


def test_equal_names_stay_apart_in_everything_that_is_written(output, tmp_path):
    """Also where one file is called as another one's result would be."""
    given = {"d1/a.png": (48, 64), "d2/a.png": (64, 48), "d1/a-2.png": (50, 61)}
    for number, (name, size) in enumerate(given.items()):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw_scene(*size, number)[0].save(tmp_path / name)
    out = tmp_path / "out"
    files = [tmp_path / name for name in given]
    entries = run(*files, "--weights", output / YOLOV3, "--out", out, "--score", 0, "--voc-xml")
    names = ["a", "a-3", "a-2"]
    said = {entry["image_id"]: entry["file_name"] for entry in entries}
    assert list(said.items()) == list(zip(names, map(str, files), strict=True))
    assert results(out) == sorted([*(f"{name}.jpg" for name in names), "Annotations", "predictions.json"])
    for name, file, (height, width) in zip(names, files, given.values(), strict=True):
        drawn = Image.open(out / f"{name}.jpg")
        assert drawn.width / drawn.height == pytest.approx(width / height, rel=0.01)
        text = (out / "Annotations" / f"{name}.xml").read_text()
        assert f"<filename>{file.name}</filename>" in text
        assert f"<width>{width}</width>" in text


def test_nothing_of_the_user_is_overwritten(output, photographs, tmp_path, capsys):
    """Neither what is read nor what lies in the folder of the results; results of an earlier call are."""
    draw_scene(48, 64, 0)[0].save(photographs / "holiday.jpg")
    (photographs / "Annotations").mkdir()
    (photographs / "Annotations" / "0.xml").write_text("mine")
    before = {path: path.read_bytes() for path in photographs.rglob("*") if path.is_file()}
    model = ["--weights", output / YOLOV3]
    for words in (
        [photographs / "holiday.jpg", *model, "--out", photographs],
        [photographs / "0.png", *model, "--out", photographs, "--voc-xml"],
    ):
        ends_with_error(*words)
        assert "is not overwritten: name another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in photographs.rglob("*") if path.is_file()} == before

    first = run(photographs / "1.png", *model, "--out", tmp_path / "out", "--score", 0)
    assert run(photographs / "1.png", *model, "--out", tmp_path / "out", "--score", 0) == first
    ends_with_error(tmp_path / "out" / "1.jpg", *model, "--out", tmp_path / "out")


def test_without_pictures_there_is_the_list_alone(output, photographs, tmp_path):
    words = [photographs, "--weights", output / YOLOV3, "--score", SCORE]
    assert run(*words, "--out", tmp_path / "list", "--no-pictures") == run(*words, "--out", tmp_path / "all")
    assert results(tmp_path / "list") == ["predictions.json"]


@pytest.mark.parametrize("name", [FRCNN, YOLOV3, BIRD])
def test_photographs_of_many_sizes_are_told_of_in_their_order(name, output, tmp_path):
    """They run in batches of one size, the batch that is full first."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(11):
        draw_scene(*((48, 64) if number % 3 else (64, 48)), number)[0].save(folder / f"{number:02d}.png")
    entries = run(folder, "--weights", output / name, "--out", tmp_path / "all", *score_of(name))
    seen = list(dict.fromkeys(entry["image_id"] for entry in entries))
    assert seen == sorted(seen)
    assert len(seen) > 5
    for number in (0, 5, 10):
        path = folder / f"{number:02d}.png"
        alone = run(path, "--weights", output / name, "--out", tmp_path / "alone", *score_of(name))
        together = [entry for entry in entries if entry["image_id"] == path.stem]
        assert [entry["category"] for entry in together] == [entry["category"] for entry in alone]
        assert [entry["score"] for entry in together] == pytest.approx([entry["score"] for entry in alone], rel=1e-5)


@pytest.mark.parametrize("name", [FRCNN, YOLOV3, BIRD])
def test_video_is_annotated_frame_by_frame(name, output, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    for number in range(4):
        writer.write(cv2.cvtColor(np.asarray(draw_scene(48, 64, number)[0]), cv2.COLOR_RGB2BGR))
    writer.release()
    entries = run(clip, "--weights", output / name, "--out", tmp_path / "out", *score_of(name))
    assert sorted({entry["image_id"] for entry in entries}) == [f"clip_{number:06d}" for number in range(4)]

    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    source = cv2.VideoCapture(str(clip))
    for number in range(4):
        assert drawn.read()[0]
        cv2.imwrite(str(tmp_path / "frame.png"), source.read()[1])
        frame = [entry for entry in entries if entry["image_id"] == f"clip_{number:06d}"]
        alone = run(tmp_path / "frame.png", "--weights", output / name, "--out", tmp_path / "alone", *score_of(name))
        # In a batch of another size float32 may have other last digits.
        assert [entry["category"] for entry in frame] == [entry["category"] for entry in alone]
        for key in {"score", "bbox"} & frame[0].keys():
            found, expected = (np.array([entry[key] for entry in each]) for each in (frame, alone))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert results(tmp_path / "out") == ["clip.mp4", "predictions.json"]


@pytest.mark.parametrize(
    ("header", "rate"), [(29.97, 29.97), (0, 25), (-1, 25), (math.inf, 25), (math.nan, 25), (1e6, 65_535)]
)
def test_a_rate_that_no_video_can_have_is_not_taken(monkeypatch, header, rate):
    monkeypatch.setattr(video, "_capture", lambda path: Mock(get=lambda key: header))
    taken = video.frame_rate(Path("a.mp4"))
    assert video.VideoFile(Path("b.mp4"), taken).rate == taken == rate


def test_a_video_that_ends_early_is_told_of(output, tmp_path, capsys):
    """Of an AVI file the head says how many frames there are, and the index at its end is not needed."""
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 5, (64, 48))
    for number in range(20):
        writer.write(np.asarray(draw_scene(48, 64, number)[0]))
    writer.release()
    words = ["--weights", output / BIRD, "--out", tmp_path / "out"]
    assert len(run(clip, *words)) == 20 * 5
    assert "warning" not in capsys.readouterr().err
    clip.write_bytes(clip.read_bytes()[: int(0.6 * clip.stat().st_size)])
    frames = len({entry["image_id"] for entry in run(clip, *words)})
    said = capsys.readouterr()
    assert 5 < frames < 20
    assert f"warning: {clip}: ends after {frames} frames, its header says 20" in said.err
    assert "the sound of videos is not kept" in said.out


def write_clip(path: Path, rate: float, frames: int, size: tuple[int, int] = (64, 48)) -> None:
    writer = cv2.VideoWriter(str(path.absolute()), cv2.VideoWriter.fourcc(*"MJPG"), rate, size)
    for number in range(frames):
        writer.write(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8))
    writer.release()


@pytest.mark.parametrize("rate", [119.877, 240, 0.5])
def test_every_rate_of_frames_is_kept(output, tmp_path, rate):
    write_clip(tmp_path / "clip.avi", rate, 5)
    run(tmp_path / "clip.avi", "--weights", output / BIRD, "--out", tmp_path / "out")
    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 5
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(rate, rel=1e-3)


def test_videos_of_a_folder_are_taken_and_a_colon_is_no_protocol(output, photographs, tmp_path, monkeypatch):
    write_clip(photographs / "12:30.avi", 5, 3)
    monkeypatch.chdir(photographs)
    for images in (".", "12:30.avi"):
        entries = run(images, "--weights", output / BIRD, "--out", tmp_path / "out")
        assert {"12:30_000000", "12:30_000001", "12:30_000002"} <= {entry["image_id"] for entry in entries}


def test_a_video_that_the_disk_cannot_hold_takes_no_place(output, photographs, tmp_path):
    """A limit on the size of a file stands for a full disk, of which OpenCV says nothing."""
    write_clip(tmp_path / "noise.avi", 5, 20, (640, 480))
    program = """
import resource, signal, sys
from tools.predict import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
main(sys.argv[1:])
"""
    out = tmp_path / "out"
    files = [tmp_path / "noise.avi", photographs / "0.png"]
    words = [*files, "--weights", output / YOLOV3, "--out", out, "--score", SCORE]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "noise.mp4: " in done.stderr and " of 20 frames could be written" in done.stderr
    assert results(out) == ["0.jpg", "predictions.json"]
    assert {entry["image_id"] for entry in json.loads((out / "predictions.json").read_text())} == {"0"}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Files that only look like photographs and a video."""
    folder = tmp_path / "broken"
    folder.mkdir()
    draw_scene(48, 64, 0)[0].save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:500])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("text")
    (folder / "text.mp4").write_text("text")
    return folder


def test_unreadable_files_are_named_and_left_out(output, photographs, broken, tmp_path, capsys):
    files = [photographs / "0.png", broken, broken / "text.mp4", photographs / "1.png"]
    ends_with_error(*files, "--weights", output / BIRD, "--out", tmp_path / "out")
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["image_id"] for entry in entries} == {"0", "1"}
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 4
    for name, warning in zip(("cut.jpg", "empty.png", "text.jpg", "text.mp4"), warnings, strict=True):
        assert name in warning
    assert "2 files" in said.out
    assert "error: 4 of 6 files could not be read" in said.err


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names of files that are not in UTF-8")
def test_a_video_whose_name_opencv_would_crash_at_is_left_out(output, photographs, tmp_path, capsys):
    video = Path(os.fsdecode(os.fsencode(tmp_path / "holiday ") + b"\xff.mp4"))
    video.touch()
    ends_with_error(photographs / "0.png", video, "--weights", output / BIRD, "--out", tmp_path / "out")
    assert "\\xff.mp4': is no name in UTF-8" in capsys.readouterr().err
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["image_id"] for entry in entries} == {"0"}


@pytest.mark.parametrize("name", [FRCNN, YOLOV3, BIRD])
def test_one_odd_file_ends_nothing(name, output, photographs, tmp_path, capsys):
    """Pictures of odd shapes are pictures; what unfolds to too much, and folders with the name of one, are named."""
    for size in ((3000, 2), (2, 3000), (1, 1)):
        Image.new("RGB", size, "red").save(photographs / f"{size[0]}x{size[1]}.png")
    Image.new("1", (20_000, 20_000)).save(photographs / "bomb.png")
    (photographs / "folder.jpg").mkdir()
    ends_with_error(photographs, "--weights", output / name, "--out", tmp_path / "out", *score_of(name, 0))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2
    assert "bomb.png" in warnings[0] and "folder.jpg" in warnings[1]
    drawn = {path.stem for path in (tmp_path / "out").glob("*.jpg")}
    assert drawn == {"0", "1", "2", "3000x2", "2x3000", "1x1"}
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {entry["image_id"] for entry in entries} >= {"0", "1", "2"}


def test_what_a_user_gets_wrong_is_one_line(output, photographs, broken, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(output / YOLOV3 / "model_best.pth", bare)
    bird, photograph = ["--weights", output / BIRD], photographs / "0.png"
    for words, expected in (
        ([photograph], "WEIGHTS is not given"),
        (bird, "IMAGES is not given"),
        ([photograph, "--weights", tmp_path / "nowhere.pth"], "nowhere.pth: no such file"),
        ([photograph, "--weights", tmp_path], "holds no model_best.pth"),
        ([photograph, "--weights", bare], "no config.yaml of a detector's run lies beside it"),
        ([photograph, *bird, "--voc-xml"], "is a classifier, which finds no boxes"),
        ([photograph, *bird, "--score", 0.5], "is a classifier, which names five species"),
        ([photograph, *bird, "--score", 2], "SCORE=2: expected a number from 0 to 1, or best"),
        ([photograph, *bird, "--score", "good"], "SCORE=good: expected a number from 0 to 1, or best"),
        ([broken, *bird], "none of the 4 files could be read"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(*words, "--out", tmp_path / "out")
        assert exit.value.code == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
        assert len(errors) == 1
        assert expected in errors[0]
    assert not (tmp_path / "out" / "predictions.json").exists()


def test_newest_classifier_is_found_among_detectors(output, tmp_path):
    assert newest_classifier(output) == output / BIRD / "model_best.pth"
    assert newest_classifier(tmp_path) is None
