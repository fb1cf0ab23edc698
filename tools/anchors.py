"""Finds anchors for a data set by k-means, and says how well they and the present ones fit its objects."""

from collections.abc import Sequence
from pathlib import Path

import torch

from common.data_root import resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from detection.config import CONFIGS, get_cfg, merge_file
from detection.voc import OFFICIAL_FOLDERS, default_train, records_of, register_voc
from detection.yolov3.anchors import kmeans_anchors, mean_best_iou


def object_sizes(records: Sequence[dict], image_size: int) -> torch.Tensor:
    """Width and height (N, 2) of all objects, in pixels of images whose longer side is `image_size`."""
    sizes = [
        ((x2 - x1) * image_size / max(record["height"], record["width"]),
         (y2 - y1) * image_size / max(record["height"], record["width"]))
        for record in records
        for x1, y1, x2, y2 in (annotation["bbox"] for annotation in record["annotations"])
    ]  # fmt: skip
    return torch.tensor(sizes, dtype=torch.float64).view(-1, 2)


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the anchors as a line for a configuration, and the mean best IoU of the old and the new ones.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: data, configuration or size are missing or wrong, or there are fewer objects than anchors.
    """
    parser = ArgumentParser(prog="tools.anchors", description=__doc__)
    parser.add_argument("--data", help="data root, or one folder in VOC layout; default datasets/, else the sample")
    parser.add_argument("--config", type=Path, default=CONFIGS / "Base-YOLOv3.yaml", help="the present anchors")
    parser.add_argument("--size", type=int, default=416, help="longer side of the images that the network sees")
    args = parser.parse_args(argv)
    if args.size < 1:
        raise UserError(f"SIZE={args.size}: expected 1 or more")

    cfg = get_cfg()
    merge_file(cfg, args.config)
    old = torch.tensor(cfg.MODEL.YOLOV3.ANCHORS, dtype=torch.float64)  # (L, A, 2)
    root, _ = resolve_data_root(args.data, OFFICIAL_FOLDERS.values())
    register_voc(root)
    splits = default_train(root)
    sizes = object_sizes(records_of(splits), args.size)
    count = old.shape[0] * old.shape[1]
    if len(sizes) < count:
        raise UserError(f"{root}: {len(sizes)} objects in {', '.join(splits)}, expected {count} or more for k-means")

    new = kmeans_anchors(sizes, count).round().clamp(min=1)
    print(f"{len(sizes):,} objects of {', '.join(splits)} in {root}/, images scaled to {args.size} pixels")
    print(f"mean best IoU: {mean_best_iou(sizes, old.flatten(0, 1)):.4f} with the anchors of {args.config}")
    print(f"               {mean_best_iou(sizes, new):.4f} with these, for MODEL.YOLOV3 in a configuration:")
    print(f"ANCHORS: {new.int().view_as(old).tolist()}")


if __name__ == "__main__":
    main()
