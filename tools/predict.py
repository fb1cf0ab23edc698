"""Uses a trained model on photographs and videos: `make predict WEIGHTS=output/RUN IMAGES="a.jpg dir/ clip.mp4"`.

Any model of the project is recognised by its checkpoint. Into the folder of the results go an annotated picture or
video of each file and `predictions.json`, a list in COCO's result form, pixels counted from 0: `{"image_id": "street",
"file_name": "photos/street.jpg", "category_id": 12, "category": "dog", "bbox": [x, y, width, height], "score": 0.9}`.
A frame of a video is an image of its own, `street_000042`. The bird classifier gives five entries an image, which have
no box.
"""

import argparse
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from tqdm import tqdm

import classification
import detection
from classification.model import KIND
from classification.predict import BirdClassifier
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.exported import is_exported, read_card
from common.files import write_text
from common.images import SUFFIXES, find_images, write_picture
from common.prediction import Prediction, best_weights, parse_score
from common.results import LeftOut, reserve_results, unique_names
from common.runtime import keep_freed_memory
from common.threads import available_cores
from common.weights import read_checkpoint
from detection.config import LEAF
from detection.drawing import Picture, bars, beside, class_colors
from detection.evaluation import read_threshold
from detection.predict import Detector
from detection.starts import is_foreign_file
from detection.voc_annotations import annotation_xml
from tools.video import VIDEO_SUFFIXES, VideoFile, count_frames, frame_rate, is_video, read_frames


def load_model(weights: str, model: str = "faster_rcnn") -> Detector | BirdClassifier:
    """Loads any trained model.

    Args:
        weights: a run folder, whose `model_best.pth` is meant, a file in one, an exported file, or a whole detector of
            others, such as "coco"; see `detection.starts`.
        model: which detector "coco" means.

    Raises:
        UserError: this is no such model, or it is broken.
    """
    path = best_weights(Path(weights))
    return classification.load(path) if is_classifier(path) else detection.load(weights, model)


def is_classifier(path: Path) -> bool:
    """Whether a file holds a bird classifier; one that is not there holds none.

    Raises:
        UserError: it is broken.
    """
    if is_exported(path):
        return read_card(path)["kind"] == KIND
    return path.is_file() and not is_foreign_file(path) and "model_name" in read_checkpoint(path)


def draw(picture: Picture, prediction: Prediction, colors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The annotated picture: objects in the image, or the image beside the bars of its likeliest species.

    Args:
        picture: of the image; it is drawn on.
        prediction: what is drawn.
        colors: of the classes, see `class_colors`.

    Returns:
        uint8 (H, W, 3), RGB.
    """
    if prediction.boxes is None:
        likeliest = dict(zip(prediction.names, prediction.scores.tolist(), strict=True))
        height, width = picture.pixels.shape[:2]
        return beside([picture.pixels, bars(likeliest, (height, max(width // 2, 400)))], [])
    picture.draw_objects(prediction.names, prediction.boxes, colors, prediction.scores)
    return picture.pixels


def to_entries(image_id: str, path: Path, prediction: Prediction, class_names: Sequence[str]) -> list[str]:
    """The entries of `predictions.json` for an image or a frame of a file, one JSON object each."""
    boxes: list = [None] * len(prediction)
    if prediction.boxes is not None:
        boxes = BoxMode.convert(prediction.boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).round(2).tolist()
    number = {name: place for place, name in enumerate(class_names, start=1)}
    return [
        json.dumps(
            {
                "image_id": image_id,
                "file_name": str(path),
                "category_id": number[name],
                "category": name,
                **({"bbox": box} if box else {}),
                "score": score,
            }
        )
        for name, score, box in zip(prediction.names, prediction.scores.tolist(), boxes, strict=True)
    ]


class Writers:
    """Threads that draw and write while the network runs; no more than a few pictures wait for them."""

    def __init__(self) -> None:
        cores = available_cores()
        self._pool, self._most_pending = ThreadPoolExecutor(cores), 4 * cores
        self._pending: deque[tuple[Future, Callable[[Any], object]]] = deque()

    def submit(self, work: Callable[[], Any], then: Callable[[Any], object] = lambda result: None) -> None:
        """Has work done by a thread; then this one does something with the result, in the order of the calls."""
        if len(self._pending) > self._most_pending:
            self._finish_first()
        self._pending.append((self._pool.submit(work), then))

    def finish(self) -> None:
        """Waits for everything."""
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        future, then = self._pending.popleft()
        then(future.result())

    def __enter__(self) -> "Writers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self._pool.shutdown(cancel_futures=True)


def _draw_into(path: Path, picture: Picture, prediction: Prediction, colors: Mapping[str, np.ndarray]) -> None:
    write_picture(path, draw(picture, prediction, colors))


def _write_voc(path: Path, file_name: str, size: tuple[int, int], prediction: Prediction) -> None:
    assert prediction.boxes is not None, "a classifier is refused at the start"
    objects = list(zip(prediction.names, prediction.boxes.tolist(), strict=True))
    text = annotation_xml(file_name, *size, objects)
    write_text(path, text)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
        UserError: something is missing, or out of its range.
    """
    parser = ArgumentParser(prog="tools.predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="photographs or videos: files, folders or patterns")
    parser.add_argument("--start", "--weights", help="run folder of any model, a checkpoint in it, or coco")
    parser.add_argument("--model", choices=LEAF, default="faster_rcnn", help="which detector coco means")
    parser.add_argument("--out", type=Path, default=Path("output/predictions"), help="folder of the results")
    parser.add_argument(
        "--score", type=_score_or_best, help='objects have at least this one (0.5); "best": that with the best F1'
    )
    parser.add_argument("--voc-xml", action="store_true", help="also write the objects of photographs as VOC XML")
    parser.add_argument("--no-pictures", action="store_true", help="write predictions.json alone")
    args = parser.parse_args(argv)
    if args.start is None:
        raise UserError("WEIGHTS is not given; expected WEIGHTS=path of a run folder, or START=coco")
    args.images = find_images(args.images, SUFFIXES | VIDEO_SUFFIXES)
    if not args.images:
        raise UserError('IMAGES is not given; expected IMAGES="files, folders or patterns" of photographs or videos')
    return args


def _score_or_best(text: str) -> float | str:
    return text if text == "best" else parse_score(text, "a number from 0 to 1, or best")


def predict_files(
    model: Detector | BirdClassifier,
    paths: Sequence[Path],
    out: Path,
    score: float,
    has_pictures: bool = True,
    has_voc_xml: bool = False,
) -> None:
    """Predicts, draws and writes; a file that cannot be read is named and left out.

    Args:
        model: the trained model.
        paths: photographs and videos.
        out: folder of the results.
        score: predictions below it are dropped.
        has_pictures: whether annotated pictures and videos are written.
        has_voc_xml: whether VOC annotations of the photographs are written.

    Raises:
        UserError: a file could not be read; the others are done.
    """
    videos = {path for path in paths if is_video(path)}
    names = unique_names(paths, videos)
    results = [out / f"{name}{'.mp4' if path in videos else '.jpg'}" for path, name in zip(paths, names, strict=True)]
    annotations = out / "Annotations"
    files = ["predictions.json"]
    if has_pictures:
        files += [path.name for path in results]
    if has_voc_xml:
        files += [
            f"{annotations.name}/{name}.xml" for path, name in zip(paths, names, strict=True) if path not in videos
        ]
    reserve_results(out, files, paths)

    entries: list[list[str]] = [[] for _ in paths]
    keep = Picture if has_voc_xml or has_pictures else lambda pixels: None
    photographs = [place for place, path in enumerate(paths) if path not in videos]
    total = sum(count_frames(path) if path in videos else 1 for path in paths)
    colors = class_colors(model.class_names)
    annotated_videos = 0
    with tqdm(total=total, unit="image", disable=None, smoothing=0.05) as progress, Writers() as writers:
        left_out = LeftOut(len(paths), progress)
        for index, picture, prediction in model.stream([paths[i] for i in photographs], keep, left_out):
            place, prediction = photographs[index], prediction.above(score)
            entries[place] = to_entries(names[place], paths[place], prediction, model.class_names)
            if has_pictures:
                writers.submit(partial(_draw_into, results[place], picture, prediction, colors))
            if has_voc_xml:
                path, size = annotations / f"{names[place]}.xml", (picture.height, picture.width)
                writers.submit(partial(_write_voc, path, paths[place].name, size, prediction))
            progress.update()

        for place, path in enumerate(paths):
            if path not in videos:
                continue
            try:
                with VideoFile(results[place], frame_rate(path)) as video:
                    for number, picture, prediction in model.stream(read_frames(path, left_out.warn), keep):
                        prediction = prediction.above(score)
                        image_id = f"{names[place]}_{number:06d}"
                        entries[place] += to_entries(image_id, path, prediction, model.class_names)
                        if has_pictures:
                            writers.submit(partial(draw, picture, prediction, colors), then=video.write)
                        progress.update()
                    writers.finish()
                annotated_videos += has_pictures
            except UserError as error:
                entries[place].clear()
                left_out(error)

    left_out.raise_if_all()
    lines = ",\n".join(entry for of_file in entries for entry in of_file)
    write_text(out / "predictions.json", f"[\n{lines}\n]\n")
    print(
        f"{sum(map(len, entries))} predictions on {len(paths) - left_out.count} files, with predictions.json, are in "
        f"{out}" + "; the sound of videos is not kept" * bool(annotated_videos)
    )
    left_out.raise_if_any()


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Predicts what the command line names; a file that cannot be read makes the exit code 2.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: there is no model, or a file that could not be read.
    """
    args = parse_args(argv)
    keep_freed_memory()
    model = load_model(args.start, args.model)
    names_species = isinstance(model, BirdClassifier)
    if args.voc_xml and names_species:
        raise UserError(f"{args.start}: is a classifier, which finds no boxes; expected a detector for VOC_XML=1")
    if args.score is not None and names_species:
        raise UserError(f"{args.start}: is a classifier, which names five species; expected a detector for SCORE=")
    score = model.min_score if args.score is None else args.score
    if isinstance(model, Detector) and score == "best":
        score = read_threshold(model.weights)
    predict_files(model, args.images, args.out, score, not args.no_pictures, args.voc_xml)


if __name__ == "__main__":
    main()
