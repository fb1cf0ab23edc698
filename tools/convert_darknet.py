"""Converts YOLOv3's weights between Darknet's files (.weights) and ours (.pth), whichever of them the source is.

A whole detector becomes a run folder: its configuration, with the names of its classes, is written beside the weights.
"""

from collections.abc import Sequence
from pathlib import Path

from detectron2.modeling import build_model

from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_text
from common.weights import load_state, read_checkpoint, save_checkpoint, weights_of
from detection.config import CONFIGS, get_cfg, merge_file, merge_options
from detection.starts import foreign_cfg, identify
from detection.yolov3.darknet_weights import is_darknet_file, read_darknet_weights, write_darknet_weights


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Converts a file and prints how many values were in it; the folder of the target is made.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: source and target are not one file of each kind, the source does not fit the configuration, the
            target cannot be written, or its folder belongs to another run.
    """
    parser = ArgumentParser(prog="tools.convert_darknet", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="Darknet's .weights or our .pth")
    parser.add_argument("target", type=Path, help="file of the other kind, in .pth or .weights")
    parser.add_argument("--config", type=Path, help="of the network; default that of the weights")
    parser.add_argument("--backbone", action="store_true", help="the backbone only, also out of a whole detector")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs over the configuration")
    args = parser.parse_args(argv)
    from_darknet = args.target.suffix == ".pth"
    is_darknet = args.source.is_file() and is_darknet_file(args.source)
    same_kind = args.source.suffix == ".pth" if from_darknet else is_darknet or args.source.suffix == ".weights"
    if args.target.suffix not in (".pth", ".weights") or same_kind:
        raise UserError(f"{args.source} to {args.target}: expected one of Darknet's and the other in .pth")

    options = ["MODEL.DEVICE", "cpu", *args.opts]
    is_whole = from_darknet and not args.backbone
    if is_whole and args.source.is_file() and not args.config and identify(str(args.source)):
        cfg = foreign_cfg(str(args.source), options)
    else:
        cfg = get_cfg()
        merge_file(cfg, args.config or _configuration(args.source))
        merge_options(cfg, options)
    beside = args.target.parent / "config.yaml"
    if is_whole and beside.exists():
        raise UserError(f"{beside}: the folder is that of another run; name a new one for {args.target.name}")
    model = build_model(cfg)
    part, prefix = (model.backbone, "backbone.") if args.backbone else (model, "")
    left = 0
    try:
        args.target.parent.mkdir(parents=True, exist_ok=True)
        if from_darknet:
            images_seen, count, left = read_darknet_weights(args.source, part, partly=args.backbone)
            state = {prefix + name: value for name, value in part.state_dict().items()}
            save_checkpoint(args.target, {"model": state, "images_seen": images_seen})
            if is_whole:
                write_text(beside, cfg.dump())
        else:
            checkpoint = read_checkpoint(args.source)
            weights = weights_of(checkpoint)
            state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            load_state(part, state, args.source)
            count = write_darknet_weights(args.target, part, checkpoint.get("images_seen", 0))
    except OSError as error:
        raise UserError(f"{args.target}: cannot be written ({error.strerror}); name another file") from error
    print(f"{args.source} -> {args.target}: {count:,} values" + f"; {left:,} beyond the backbone left out" * bool(left))


def _configuration(source: Path) -> Path:
    """That of the run, that of a published file, or else that of Darknet's large detector."""
    if (source.parent / "config.yaml").is_file():
        return source.parent / "config.yaml"
    found = identify(str(source)) if source.is_file() else None
    return CONFIGS / f"{found.leaf if found else 'yolov3_darknet53_coco'}.yaml"


if __name__ == "__main__":
    main()
