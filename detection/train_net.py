"""Trains, resumes and evaluates a detector: Faster R-CNN or YOLOv3, on Pascal VOC or any folder in its layout.

`make train-frcnn` runs `python -m tools.launch detection.train_net --model faster_rcnn`.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_text
from common.log import RunLog
from common.processes import is_main_process, join_processes, leave_processes, on_main_process
from common.run_folder import create_run_folder, refuse_taken_name, write_results
from common.runtime import default_device, keep_freed_memory
from detection.config import LEAF, RECIPES, RecordingCfg, blamed_on, refuse_unread
from detection.data_checks import check_classes, check_datasets, check_pictures
from detection.experiment import (
    check_meta_architecture,
    new_experiment,
    newest_detector,
    newest_run,
    recorded,
    resumed_experiment,
    run_names,
    use_test_data,
)
from detection.hooks import METRIC
from detection.modeling import load_detector, read_detector_cfg
from detection.starts import folder_of, resolve_detector
from detection.trainer import Evaluator, Trainer

logger = logging.getLogger("detection.train_net")  # it runs as __main__

QUIET = [f"detectron2.{name}" for name in ("data.common", "engine.defaults", "engine.hooks", "evaluation.evaluator")]


def train(args: argparse.Namespace, log: RunLog) -> Path:
    """Trains or resumes one run. Nothing is written before everything is built.

    Returns:
        The run folder.
    """
    if args.name and not args.resume:
        on_main_process(refuse_taken_name, args.output, args.name)
    run = on_main_process(newest_run, args) if args.resume else None
    begun = run if run is not None and on_main_process(Path.exists, run / "config.yaml") else None
    experiment = resumed_experiment(args, begun) if begun is not None else new_experiment(args)
    experiment.resolve()
    cfg = RecordingCfg(experiment.cfg)
    cfg.freeze()
    with blamed_on(experiment.given):
        trainer = Trainer(cfg, begun, experiment.given)
    refuse_unread(cfg, experiment.recipe, experiment.given)

    if begun is not None and trainer.is_finished():
        logger.info(
            "%s is complete; to go on, RESUME=1 with a larger SOLVER.MAX_EPOCHS or TEST.PATIENCE in OPTS", begun
        )
        return begun
    if run is None:
        run = on_main_process(create_run_folder, args.output, args.name or experiment.name)
    if is_main_process():
        write_text(run / "config.yaml", cfg.dump())
        log.open(run)
    trainer.train(run)
    if is_main_process():
        write_results(run)
        logger.info(
            "Best %s on %s: %.4f after iteration %d (chosen on that split). Everything is in %s",
            METRIC, ", ".join(cfg.DATASETS.TEST), trainer.best.value, trainer.best.when + 1, run,
        )  # fmt: skip
    return run


def eval_only(args: argparse.Namespace) -> None:
    """Evaluates weights and prints the tables; the files go into `evaluation/` beside the weights.

    With test-time augmentation they go into `evaluation_tta/`, so that both can be compared.

    Raises:
        UserError: there are no weights, or data or classes do not fit them.
    """
    if default_device() == "cpu":
        keep_freed_memory()
    start = resolve_detector(args.start, args.model) if args.start else None
    source = start or str(newest_detector(args.output, args.model, args.recipe, args.config, args.backbone) or "")
    if not source:
        name = run_names(args)[0]
        raise UserError(f"{args.output}: no trained {name} in it; expected WEIGHTS=path, START=coco, or train first")
    if args.start and (args.recipe or args.config or args.backbone):
        raise UserError(f"{args.start}: has a configuration of its own; leave RECIPE, CONFIG and BACKBONE out")
    asked = read_detector_cfg(source, args.opts)
    check_meta_architecture(asked, args.model, source)
    use_test_data(asked, args.data, args.opts[::2])
    check_datasets(asked, ["TEST"])
    classes = MetadataCatalog.get(asked.DATASETS.TEST[0]).thing_classes
    cfg, model = load_detector(source, args.opts, args.model, classes)
    cfg.DATASETS.ROOT, cfg.DATASETS.TEST = asked.DATASETS.ROOT, asked.DATASETS.TEST
    check_classes(cfg, source)
    on_main_process(check_pictures, cfg, cfg.DATASETS.TEST)
    evaluator = Evaluator(cfg)
    refuse_unread(cfg, read_detector_cfg(source), args.opts[::2])
    folder = folder_of(source, args.output) / ("evaluation_tta" if cfg.TEST.AUG.ENABLED else "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    with recorded(folder, cfg, weights=source):
        metrics = evaluator.evaluate(model)
        evaluator.write(folder)
    if is_main_process():
        logger.info(
            "%s on %s: %s; files in %s",
            source, ", ".join(cfg.DATASETS.TEST),
            "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()), folder,
        )  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads a command line; None takes that of the process."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(LEAF), default="faster_rcnn")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--recipe", choices=RECIPES, help="default best, or that of a whole detector to start from")
    choice.add_argument("--config", type=Path, help="a YAML of your own over those of detection/configs")
    parser.add_argument("--data", help="data root, or one folder in VOC layout; default datasets/, else the sample")
    parser.add_argument(
        *("--start", "--weights"),
        help="coco, imagenet, random, a file, a run folder or a name of a hub to start from, or to evaluate",
    )
    parser.add_argument(
        "--pretrained", type=int, choices=[0, 1], default=1, help="0 is --start random, where no start is given"
    )
    parser.add_argument("--backbone", help="any network of timm with strides 8 to 32, of 4 too for Faster R-CNN")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--name", help="name of the run folder, instead of that of the configuration")
    parser.add_argument("--resume", action="store_true", help="go on with that run, or the newest of the recipe")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs over the configuration")
    return parser.parse_args(argv)


@exits_on_user_error
def main() -> None:
    """Trains or evaluates in every process that was started."""
    args = parse_args()
    join_processes()
    log = RunLog("detection", "common", "detectron2", "fvcore", quiet=QUIET)
    eval_only(args) if args.eval_only else train(args, log)
    leave_processes()


if __name__ == "__main__":
    main()
