"""Writes a trained model for another runtime: `make export WEIGHTS=output/RUN FORMAT=openvino PRECISION=int8`.

Any model of the project is recognised by its checkpoint. The file has everything that its use needs, from the names of
the classes to the thresholds of the suppression, and is taken as WEIGHTS wherever a trained model is.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from classification.export import exportable_classifier
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.export import PRECISIONS, write_exported
from common.exported import SUFFIXES, is_exported
from common.prediction import best_weights
from detection.config import LEAF
from detection.export import exportable_detector
from detection.starts import folder_of, resolve_detector
from tools.predict import is_classifier


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and exports.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: there is no such model, the runtime cannot have it so, or a package is not installed.
    """
    parser = ArgumentParser(prog="tools.export", description=__doc__.splitlines()[0])
    parser.add_argument("--start", "--weights", help="run folder of any model, a checkpoint in it, or coco")
    parser.add_argument("--model", choices=LEAF, default="faster_rcnn", help="which detector coco means")
    parser.add_argument("--format", choices=SUFFIXES, default="openvino")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="that the runtime is to compute in")
    parser.add_argument(
        "--size",
        type=int,
        help="side of the images in pixels: the short one, of YOLOv3 the long one; default: that of the run's tests",
    )
    parser.add_argument("--data", help="data root of the training images that int8 is calibrated on")
    parser.add_argument("--out", type=Path, help="folder; default openvino-int8/, or the like, in that of the run")
    args = parser.parse_args(argv)
    if args.start is None:
        raise UserError("WEIGHTS is not given; expected WEIGHTS=path of a run folder, or START=coco")
    if is_exported(args.start):
        raise UserError(f"{args.start}: is exported already; expected the run folder that it came from")
    path = best_weights(Path(args.start))
    if is_classifier(path):
        model, folder = exportable_classifier(path, args.size), path.parent
    else:
        model = exportable_detector(args.start, args.model, args.size)
        folder = folder_of(resolve_detector(args.start, args.model))
    start = time.perf_counter()
    out = args.out or folder / f"{args.format}-{args.precision}"
    file = write_exported(model, args.format, args.precision, args.data, out)
    print(f"{file}: written in {time.perf_counter() - start:.0f} s; it takes {model.card['input']}")


if __name__ == "__main__":
    main()
