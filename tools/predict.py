"""Uses a trained model on photographs and videos: `make predict WEIGHTS=output/RUN IMAGES="a.jpg dir/ clip.mp4"`.

Any model of the project is recognised by its checkpoint. Into the folder of the results go an annotated picture or
video of each file and `predictions.json`, a list in COCO's result form, pixels counted from 0:
`{"image_id": "street", "category_id": 12, "category": "dog", "bbox": [x, y, width, height], "score": 0.9}`. A frame of
a video is an image of its own, `street_000042`. The bird classifier gives five entries an image, which have no box.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from classification.predict import BirdClassifier
from common.errors import UserError, exits_on_user_error
from common.images import find_images, read_image
from common.run_folder import write_atomically
from common.runtime import default_device
from common.weights import read_checkpoint
from detection.comparison import Detector, corners
from detection.config import NAMES
from detection.drawing import class_colors, draw_boxes, full_frame, side_by_side, to_pixels
from detection.modeling import load_detector
from detection.voc_annotations import annotation_xml
from tools.compare_detectors import draw_objects

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong with a video is said in our own words
import cv2  # noqa: E402


def load_model(weights: Path) -> Detector | BirdClassifier:
    """Loads any trained model of the project.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, or a file in one.

    Raises:
        UserError: this is no such model, or it is broken.
    """
    if weights.is_dir():
        weights = weights / "model_best.pth"
    if "model_name" in read_checkpoint(weights):
        return BirdClassifier(weights, default_device())
    if not (weights.parent / "config.yaml").is_file():
        raise UserError(
            f"{weights}: holds no classifier of this project, and no config.yaml of a detector lies beside it; "
            "expected model_best.pth in its run folder"
        )
    cfg, model = load_detector(weights)
    return Detector(NAMES[cfg.MODEL.META_ARCHITECTURE], weights, cfg, model)


def draw_detections(image: torch.Tensor, objects: Sequence[dict], classes: Sequence[str]) -> Figure:
    """The image itself with objects drawn into it.

    Args:
        image: uint8, (3, H, W), RGB.
        objects: as `Detector.detect` gives them, best first.
        classes: all classes of the detector.
    """
    figure, axes = full_frame(image)
    draw_objects(axes, image, objects, dict(zip(classes, class_colors(len(classes)), strict=True)))
    return figure


def draw_species(image: torch.Tensor, likeliest: dict[str, float]) -> Figure:
    """The image beside the bars of its likeliest species, whose probabilities `likeliest` has, the likeliest first."""
    figure, (left, right) = side_by_side(image, 2)
    draw_boxes(left, image, np.empty((0, 4)), np.empty((0, 3)))
    places = range(len(likeliest))
    right.barh(places, list(likeliest.values()), color="tab:blue", alpha=0.35)
    for place, (name, probability) in zip(places, likeliest.items(), strict=True):
        right.text(0.02, place, f"{100 * probability:.1f} %  {name}", va="center", fontsize=10)
    right.set(xlim=(0, 1), ylim=(len(likeliest) - 0.4, -0.6), xlabel="probability")
    right.set_yticks([])
    right.spines[["top", "left", "right"]].set_visible(False)
    return figure


def predict(model: Detector | BirdClassifier, image: torch.Tensor, score: float) -> tuple[list[dict], Figure]:
    """What a model says of one image.

    Args:
        model: of `load_model`.
        image: uint8, (3, H, W), RGB.
        score: objects have at least this one; the classifier always names five species.

    Returns:
        Entries of `predictions.json` without `image_id`, and the annotated picture.
    """
    if isinstance(model, BirdClassifier):
        likeliest = model.likeliest(model.cut_out(image))
        found: list[dict] = [{"class": name, "score": probability} for name, probability in likeliest.items()]
        classes, figure = model.class_names, draw_species(image, likeliest)
    else:
        found = [box for box in model.detect(image)[0] if box["score"] >= score]
        classes = model.cfg.MODEL.CLASSES
        figure = draw_detections(image, found, classes)
    entries = [
        {
            "category_id": classes.index(thing["class"]) + 1,
            "category": thing["class"],
            **({"bbox": [round(value, 2) for value in thing["bbox"]]} if "bbox" in thing else {}),
            "score": thing["score"],
        }
        for thing in found
    ]
    return entries, figure


def predict_video(
    model: Detector | BirdClassifier, path: Path, target: Path, score: float, progress: tqdm
) -> Iterator[list[dict]]:
    """Annotates a video frame by frame.

    Args:
        model: of `load_model`.
        path: the video.
        target: of the annotated one, in MPEG-4; it appears when it is whole.
        score: as for `predict`.
        progress: counts frames.

    Yields:
        The entries of each frame.

    Raises:
        UserError: the video cannot be read, or the annotated one not be written.
    """
    capture, writer = cv2.VideoCapture(str(path)), None
    unfinished = target.with_name(f".{target.stem}.unfinished{target.suffix}")
    try:
        while (frame := capture.read()[1]) is not None:
            image = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)
            entries, figure = predict(model, image, score)
            drawn = cv2.cvtColor(to_pixels(figure), cv2.COLOR_RGB2BGR)
            if writer is None:
                size = drawn.shape[1::-1]
                rate = capture.get(cv2.CAP_PROP_FPS) or 25
                writer = cv2.VideoWriter(str(unfinished), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                if not writer.isOpened():
                    raise UserError(f"{target}: cannot be written; name another folder with OUT=")
            writer.write(drawn)
            progress.update()
            yield entries
        if writer is None:
            reason = "cannot be read as a video" if path.is_file() else "no such file"
            raise UserError(f"{path}: {reason}; expected one of {', '.join(sorted(VIDEO_SUFFIXES))} with a picture")
        writer.release()
        unfinished.replace(target)
    finally:
        capture.release()
        if writer is not None:
            writer.release()
        unfinished.unlink(missing_ok=True)


def _write_voc(folder: Path, name: str, path: Path, image: torch.Tensor, entries: Sequence[dict]) -> None:
    height, width = image.shape[1:]
    boxes = corners(entries).tolist()
    objects = [(entry["category"], box) for entry, box in zip(entries, boxes, strict=True)]
    text = annotation_xml(path.name, height, width, objects)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"{name}.xml", lambda file: file.write(text.encode()))


def _names(paths: Sequence[Path]) -> list[str]:
    """Stems of the files; those of several folders may be the same, and get numbers."""
    count: Counter[str] = Counter()
    names = []
    for path in paths:
        count[path.stem] += 1
        names.append(path.stem if count[path.stem] == 1 else f"{path.stem}-{count[path.stem]}")
    return names


def _frames(path: Path) -> int:
    """Number of pictures in a file; as a video's header says, which need not be right."""
    return max(int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)), 1) if _is_video(path) else 1


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Predicts, draws and writes; a file that cannot be read is named and left out.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: there is no model, or nothing that could be read.
    """
    parser = argparse.ArgumentParser(prog="tools.predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="photographs or videos: files, folders or patterns")
    parser.add_argument("--weights", type=Path, help="run folder of any model, or a checkpoint in it")
    parser.add_argument("--out", type=Path, default=Path("output/predictions"), help="folder of the results")
    parser.add_argument("--score", type=float, default=0.5, help="objects have at least this score")
    parser.add_argument("--voc-xml", action="store_true", help="also write the objects of photographs as VOC XML")
    args = parser.parse_args(argv)
    if args.weights is None:
        raise UserError("WEIGHTS is not given; expected WEIGHTS=path of a run folder, such as output/resnet18-best")
    paths = find_images(args.images)
    if not paths:
        raise UserError('IMAGES is not given; expected IMAGES="files, folders or patterns" of photographs or videos')
    if not 0 <= args.score <= 1:
        raise UserError(f"SCORE={args.score:g}: expected a number from 0 to 1")
    model = load_model(args.weights)
    if args.voc_xml and isinstance(model, BirdClassifier):
        raise UserError(f"{args.weights}: is a classifier, which finds no boxes; expected a detector for VOC_XML=1")

    args.out.mkdir(parents=True, exist_ok=True)
    predictions, unreadable = [], 0
    with tqdm(total=sum(map(_frames, paths)), unit="picture", disable=None) as progress:
        for path, name in zip(paths, _names(paths), strict=True):
            try:
                if _is_video(path):
                    frames = predict_video(model, path, args.out / f"{name}.mp4", args.score, progress)
                    for number, entries in enumerate(frames):
                        predictions += [{"image_id": f"{name}_{number:06d}", **entry} for entry in entries]
                    continue
                image = read_image(path)
            except UserError as error:
                unreadable += 1
                progress.write(f"warning: {error}; left out", file=sys.stderr)
                continue
            entries, figure = predict(model, image, args.score)
            predictions += [{"image_id": name, **entry} for entry in entries]
            picture = Image.fromarray(to_pixels(figure))
            write_atomically(args.out / f"{name}.jpg", partial(picture.save, format="jpeg", quality=92))
            if args.voc_xml:
                _write_voc(args.out / "Annotations", name, path, image, entries)
            progress.update()
    if unreadable == len(paths):
        raise UserError(f"none of the {len(paths)} files could be read; expected photographs or videos")
    lines = ",\n".join(json.dumps(entry) for entry in predictions)
    write_atomically(args.out / "predictions.json", lambda file: file.write(f"[\n{lines}\n]\n".encode()))
    print(
        f"{len(predictions)} predictions on {len(paths) - unreadable} files, with predictions.json, are in {args.out}"
        + f"; {unreadable} could not be read" * bool(unreadable)
    )


if __name__ == "__main__":
    main()
