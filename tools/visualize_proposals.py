"""Shows what Faster R-CNN's first stage proposes beside what the second makes of it, from one forward pass.

For each image one picture: left the proposals, coloured by objectness, right the final detections. Beside them
`proposals.json`, and the recall of the proposals against the number kept where ground truth is known.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from detectron2.structures import Boxes, Instances
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

from common.data_root import resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_figure, write_json, write_table
from common.images import find_images, write_picture
from common.prediction import Prediction, parse_score
from common.results import LeftOut, reserve_results, unique_names
from detection.config import RECIPES
from detection.drawing import Picture, beside, class_colors, color_scale
from detection.experiment import newest_detector, use_test_data
from detection.predict import Detector
from detection.proposals import proposal_recall, record_proposals, to_original
from detection.starts import folder_of
from detection.voc import OFFICIAL_FOLDERS, records_of

CHOICE_SEED = 0
RECALL_IMAGES = 100  # test images that recall is measured on
COLORMAP = colormaps["plasma"]  # of objectness


def propose_and_detect(detector: Detector, image: torch.Tensor) -> tuple[Instances, Prediction]:
    """Proposals and detections of one image from the same forward pass, both in pixels of the original image."""
    with record_proposals(detector.model) as recorded:
        (prediction,) = detector.run([detector.prepare(image)])
    return to_original(recorded[0].to("cpu"), *image.shape[1:]), prediction


def draw_proposals(picture: Picture, proposals: Instances) -> None:
    """Draws proposals, sorted with the best first, into their image; the brighter, the likelier an object."""
    order = torch.arange(len(proposals)).flip(0)  # the best on top
    picture.draw_boxes(proposals.proposal_boxes.tensor[order], COLORMAP(proposals.scores[order].numpy()))


def picture(
    image: torch.Tensor,
    proposals: Instances,
    prediction: Prediction,
    colors: Mapping[str, np.ndarray],
    topk: int,
    score: float,
) -> np.ndarray:
    """The picture of one image: the `topk` best proposals left, the detections of at least `score` right."""
    left, right = Picture(image), Picture(image)
    shown, found = proposals[:topk], prediction.above(score)
    draw_proposals(left, shown)
    assert found.boxes is not None, "it is of a detector"
    right.draw_objects(found.names, found.boxes, colors, found.scores)
    captions = [
        f"first stage: {len(shown)} best of {len(proposals)} proposals",
        "",
        f"second stage: {len(found)} detection{'s' * (len(found) != 1)} with score {score:g} or more",
    ]
    return beside([left.pixels, color_scale(len(left.pixels), COLORMAP, "objectness"), right.pixels], captions)


def recall_figure(recall: pd.DataFrame, title: str) -> Figure:
    """Recall against the number of proposals kept."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(recall["proposals"], recall["recall"], marker="o")
    for k, value in zip(recall["proposals"], recall["recall"], strict=True):
        axes.annotate(f"{value:.2f}", (k, value), textcoords="offset points", xytext=(0, -14), ha="center", fontsize=8)
    axes.set(xscale="log", xlabel="proposals kept", ylabel="recall at IoU 0.5", ylim=(0, 1.05), title=title)
    axes.set_xticks(recall["proposals"], recall["proposals"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


@exits_on_user_error
def main() -> None:
    """Draws the pictures into a folder, `proposals/` in that of the weights unless another is named."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="*", help="files, folders or patterns; default four test images")
    parser.add_argument("--start", "--weights", help="default: the best weights of the newest run; or coco")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--recipe", choices=RECIPES, help="of the run; default any")
    choice.add_argument("--config", type=Path, help="configuration of one's own that the run was trained with")
    parser.add_argument("--data", help="data root; default that of the run")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--out", type=Path, help="folder for the results (default: proposals/ in that of the run)")
    parser.add_argument("--topk", type=int, default=100, help="proposals drawn")
    parser.add_argument("--score", type=parse_score, default=0.5, help="detections drawn have at least this score")
    args = parser.parse_args()
    if args.topk < 1:
        raise UserError(f"TOPK={args.topk}: expected 1 or more")

    entries: list[dict] = [{"file_name": str(path)} for path in find_images(args.images)]
    weights = args.start or newest_detector(args.output, "faster_rcnn", args.recipe, args.config)
    if weights is None:
        if args.config or args.data or not resolve_data_root(None, OFFICIAL_FOLDERS.values())[1]:
            raise UserError(
                f"{args.output}: no trained Faster R-CNN{f' of {args.config}' if args.config else ''} in it; expected "
                f"WEIGHTS=path: run make train-frcnn{f' CONFIG={args.config}' if args.config else ''}"
            )
        print("Nothing is trained yet: training on the drawn sample first, a few minutes.", flush=True)
        recipe = ["--recipe", args.recipe] if args.recipe else []
        train = ["detection.train_net", *recipe, "--output", str(args.output)]
        if code := subprocess.run([sys.executable, "-m", "tools.launch", *train], check=False).returncode:
            sys.exit(code)
        weights = newest_detector(args.output, "faster_rcnn", args.recipe)
        assert weights is not None, "the training has just written them"
    detector = Detector(weights)
    cfg = detector.cfg
    if not hasattr(detector.model, "proposal_generator"):
        raise UserError(
            f"{weights}: shows no proposals, as YOLOv3 and exported files do not; expected a run of Faster R-CNN"
        )
    folder = args.out or folder_of(detector.weights, args.output) / "proposals"

    measured: list[dict] = []
    if not entries:
        use_test_data(cfg, args.data)
        tested = records_of(cfg.DATASETS.TEST)
        with_objects = [entry for entry in tested if entry["annotations"]]
        order = np.random.default_rng(CHOICE_SEED).permutation(len(with_objects))
        entries = [with_objects[index] for index in order[:4]]
        measured = [with_objects[index] for index in order[:RECALL_IMAGES]]

    paths = [Path(entry["file_name"]) for entry in entries]
    names = [f"{name}.png" for name in unique_names(paths)]
    reserve_results(folder, ["proposals.json", "recall.csv", "recall.png", *names], paths)
    records: list[dict] = []
    colors = class_colors(detector.class_names)
    progress = tqdm(entries, unit="image", desc="pictures", disable=None)
    left_out = LeftOut(len(entries), progress)
    for entry, name in zip(progress, names, strict=True):
        try:
            image = detector.read(entry)
        except UserError as error:
            left_out(error)
            continue
        proposals, prediction = propose_and_detect(detector, image)
        write_picture(folder / name, picture(image, proposals, prediction, colors, args.topk, args.score))
        boxes = proposals.proposal_boxes.tensor
        records.append(
            {
                "file_name": entry["file_name"],
                "picture": name,
                "height": proposals.image_size[0],
                "width": proposals.image_size[1],
                "proposals": [
                    {"bbox": [round(v, 2) for v in (*box[:2], *(box[2:] - box[:2]))], "objectness": score}
                    for box, score in zip(boxes.double().numpy(), proposals.scores.tolist(), strict=True)
                ],
            }
        )
    left_out.raise_if_all()
    write_json(folder / "proposals.json", records)

    if measured:
        found, targets = [], []
        for entry in tqdm(measured, unit="image", desc="recall", disable=None):
            found.append(propose_and_detect(detector, detector.read(entry))[0].proposal_boxes)
            boxes = [annotation["bbox"] for annotation in entry["annotations"] if not annotation["difficult"]]
            targets.append(Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
        recall = pd.DataFrame(proposal_recall(found, targets).items(), columns=["proposals", "recall"])
        write_table(folder / "recall.csv", recall, index=False, float_format="%.4f")
        title = f"{len(measured)} images of {', '.join(cfg.DATASETS.TEST)}, {sum(map(len, targets))} objects"
        write_figure(folder / "recall.png", recall_figure(recall, title))
        print(f"Recall of the proposals at IoU 0.5 on {title}, difficult ones left out:")
        print(recall.to_string(index=False, float_format="%.3f"))
    print(f"{len(records)} pictures and proposals.json (boxes x, y, width, height in pixels, from 0) are in {folder}")
    left_out.raise_if_any()


if __name__ == "__main__":
    main()
