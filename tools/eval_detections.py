"""Scores any detector's boxes: `python -m tools.eval_detections DETECTIONS --split voc07_test`.

DETECTIONS are COCO results, `[{"image_id": "000001", "category": "dog", "bbox": [x, y, width, height], "score": 0.9}]`,
or a folder of VOC's or YOLO's text files; `detection.detection_files` says what each looks like.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from common.data_root import resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.run_folder import ENVIRONMENT
from detection.bootstrap import interval, resample_ap
from detection.detection_files import read_detections, write_submission
from detection.evaluation import WRITTEN, evaluate_voc
from detection.voc import OFFICIAL_FOLDERS, SPLITS, default_test, register_voc
from detection.voc_lists import read_ids


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Scores detections, prints the table and writes the files of `Evaluation.write`; or writes VOC's submission.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: data, detections or the output folder are missing or wrong.
    """
    parser = ArgumentParser(prog="tools.eval_detections", description=__doc__.split("\n")[0])
    parser.add_argument("detections", type=Path, help="COCO results as JSON, or a folder of VOC's or YOLO's text files")
    parser.add_argument("--split", help="dataset they were made on (default: voc07_test, or the root's own test split)")
    parser.add_argument("--data", help="data root (default: datasets/, or else the sample)")
    parser.add_argument("--annotations", type=Path, help="COCO's annotations, if the results use their ids")
    parser.add_argument("--interval", action="store_true", help="also 95 %% intervals, by a bootstrap over the images")
    parser.add_argument(
        "--submission", action="store_true", help="write VOC's submission form, for which no annotations are needed"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default that of the detections, unless a run's"
    )
    args = parser.parse_args(argv)

    needed = OFFICIAL_FOLDERS["voc12" if (args.split or "").startswith("voc12") else "voc07"]
    root, is_sample = resolve_data_root(args.data, OFFICIAL_FOLDERS.values(), [needed])
    register_voc(root)
    split = args.split or default_test(root)[0]
    known = sorted(
        {f"{prefix}_{name}" for prefix in ("voc", *OFFICIAL_FOLDERS) for name in SPLITS} & set(DatasetCatalog)
    )
    if split not in known:
        raise UserError(f"{root}: has no split {split!r}, expected one of {', '.join(known)}")
    metadata = MetadataCatalog.get(split)
    class_names = metadata.thing_classes
    if args.submission:
        records = [{"image_id": image_id} for image_id in read_ids(Path(metadata.dirname), metadata.split)]
    else:
        records = DatasetCatalog.get(split)

    detections = read_detections(args.detections, records, class_names, args.annotations)
    print(f"{len(detections.score)} detections on {split}, {len(records)} images of {root}/", end="")
    print(" (the drawn sample)" if is_sample else "")
    if args.submission and (wrong := next((name for name in class_names if "/" in name), None)):
        raise UserError(f"{root}: class {wrong!r}, expected a name without /, since it names a file of the submission")
    out = args.out or (args.detections if args.detections.is_dir() else args.detections.parent)
    if args.out is None and not args.submission and (out / ENVIRONMENT).exists():
        raise UserError(f"{out}: holds results of a run, which stay as they are; name another folder with OUT=")
    written = {(out / name).resolve() for name in WRITTEN}
    for source in filter(None, (args.detections, args.annotations)):
        if source.resolve() in written:
            raise UserError(f"{source}: would be overwritten by the results; name another folder for them with OUT=")
    try:
        if args.submission:
            image_ids = [record["image_id"] for record in records]
            write_submission(out / "submission", detections, image_ids, class_names, metadata.split)
            print(f"written: {out}/submission/comp4_det_{metadata.split}_<class>.txt")
            return
        evaluation = evaluate_voc(records, detections, class_names)
        if args.interval:
            resampled = resample_ap(records, detections, len(class_names))
            intervals = {metric: interval(values) for metric, values in resampled.items()}
            evaluation = replace(evaluation, intervals=intervals)
        print(evaluation.format_table())
        evaluation.write(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); name another folder with OUT=") from error
    print(f"written: {out}/evaluation.json, .csv and .md, with curves and confusion matrix")


if __name__ == "__main__":
    main()
