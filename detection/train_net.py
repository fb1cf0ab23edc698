"""Trains, resumes and evaluates a detector: Faster R-CNN or YOLOv3, on Pascal VOC or any folder in its layout.

`make train-frcnn` runs `python -m detection.train_net --model faster_rcnn` through `tools.launch`.
"""

import argparse
import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.hooks import IterationTimer, LRScheduler
from detectron2.evaluation import inference_on_dataset
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger
from torch import distributed as dist
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common.errors import UserError, exits_on_user_error
from detection.checkpoint import load_initial_weights, load_weights, save_checkpoint
from detection.config import (
    CONFIGS,
    LEAF,
    default_device,
    get_cfg,
    leaf_name,
    merge_file,
    merge_options,
    read_run_cfg,
    resolve_epochs,
)
from detection.data_loader import TrainingStream, build_train_loader, worker_count
from detection.dataset_mapper import DatasetMapper
from detection.evaluation import VOCEvaluator
from detection.hooks import (
    METRIC,
    BestCheckpoint,
    Evaluate,
    LastCheckpoint,
    MetricsWriter,
    SeedIteration,
    WeightAveraging,
    validation_loss,
)
from detection.modeling import build_model, load_detector
from detection.voc import default_splits, register_voc
from tools.data_root import data_facts, resolve_data_root
from tools.run_folder import (
    create_run_folder,
    find_run_folders,
    record_session,
    truncate_metrics,
    write_atomically,
    write_results,
)

logger = logging.getLogger("detection.train_net")  # it runs as __main__

LOGGERS = ("detection", "detectron2", "fvcore")


class Trainer(SimpleTrainer):
    """Detectron2's loop with this project's data stream, hooks and checkpoints. One for both detectors.

    Args:
        cfg: a frozen configuration with every length in iterations.
        run: the run folder, which holds all that is written.
        resume: go on from `model_last.pth` where there is one.
    """

    def __init__(self, cfg: CfgNode, run: Path, resume: bool) -> None:
        self.cfg = cfg
        self.run = run
        torch.manual_seed(cfg.SEED)
        self.bare_model = build_model(cfg)
        last = run / "model_last.pth"
        last = load_weights(self.bare_model, last) if resume and last.exists() else None
        if last is None:
            load_initial_weights(self.bare_model, cfg)
        optimizer = build_optimizer(cfg, self.bare_model)
        device = cfg.MODEL.DEVICE
        model = create_ddp_model(
            self.bare_model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if device == "cuda" else None
        )
        super().__init__(model, data_loader=None, optimizer=optimizer)
        self.scheduler = build_lr_scheduler(cfg, optimizer)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.stop_requested = False

        dataset_dicts = [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]
        self.register_hooks(self._build_hooks(len(dataset_dicts)))
        self.start_iter = 0
        if last is not None:
            self.load_state_dict(last["trainer"])
            self.start_iter = last["trainer"]["iteration"] + 1
        if comm.is_main_process():
            truncate_metrics(run, self.start_iter)

        mapper = DatasetMapper(cfg, True, dataset_dicts=dataset_dicts)
        stream = TrainingStream(dataset_dicts, mapper, cfg.SEED, cfg.SOLVER.IMS_PER_BATCH)
        self.data_loader = build_train_loader(
            stream,
            range(self.start_iter, self.max_iter),
            comm.get_rank(),
            comm.get_world_size(),
            worker_count(cfg),
        )

    def _build_hooks(self, num_images: int) -> list:
        cfg = self.cfg
        self.averaging = WeightAveraging(self.bare_model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None
        self.best = BestCheckpoint(self._save_best, cfg.TEST.PATIENCE, cfg.TEST.MIN_RISE)
        return [
            SeedIteration(cfg.SEED),
            IterationTimer(warmup_iter=0),
            LRScheduler(),
            self.averaging,
            Evaluate(cfg.TEST.EVAL_PERIOD, self.evaluate),
            self.best,
            MetricsWriter(self.run, cfg.SOLVER.LOG_PERIOD, num_images, cfg.SOLVER.IMS_PER_BATCH)
            if comm.is_main_process()
            else None,
            LastCheckpoint(self._save_last, cfg.SOLVER.CHECKPOINT_PERIOD),
        ]

    def train(self) -> None:
        """Trains from `start_iter` to `max_iter`, or until a hook asks to stop."""
        if self.start_iter >= self.max_iter or self.best.should_stop():
            reason = "stopped early" if self.best.should_stop() else "is complete"
            logger.info(
                "%s %s after iteration %d; to go on, give OPTS=\"SOLVER.MAX_ITER ...\" or \"TEST.PATIENCE ...\"",
                self.run, reason, self.start_iter,
            )  # fmt: skip
            return
        logger.info(
            "Training iterations %d to %d, batch %d, learning rate %g, into %s",
            self.start_iter + 1, self.max_iter, self.cfg.SOLVER.IMS_PER_BATCH, self.cfg.SOLVER.BASE_LR, self.run,
        )  # fmt: skip
        with EventStorage(self.start_iter) as self.storage, recorded(self.run, self.cfg):
            self.iter = self.start_iter
            self.before_train()
            try:
                while self.iter < self.max_iter and not self.stop_requested:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except FloatingPointError as error:
                raise UserError(
                    f"{self.run}: the loss of iteration {self.iter + 1} is infinite or no number, expected it to fall; "
                    "give a lower SOLVER.BASE_LR or a longer SOLVER.WARMUP_ITERS"
                ) from error
            finally:
                self.after_train()

    def evaluate(self) -> dict[str, float]:
        """AP and validation loss of the weights, or of their average; the AP on rank 0 alone."""
        with self._evaluated_weights():
            if comm.get_world_size() > 1:
                # Every process has BatchNorm statistics of its own; those of the first are saved.
                for buffer in self.bare_model.buffers():
                    dist.broadcast(buffer, src=0)
            metrics = evaluate(self.cfg, self.bare_model, self.run)
            loss = validation_loss(self.bare_model, self._validation_batches(), self.cfg.SEED)
        return {**metrics, **loss}

    def _evaluated_weights(self) -> contextlib.AbstractContextManager:
        return self.averaging.applied() if self.averaging else contextlib.nullcontext()

    def _validation_batches(self) -> Iterator[list[dict]]:
        """This rank's share of evenly spaced labelled test images, as the model sees them without augmentation."""
        wanted = self.cfg.TEST.VALIDATION_LOSS_IMAGES
        if not wanted:
            return
        dataset_dicts = [entry for name in self.cfg.DATASETS.TEST for entry in DatasetCatalog.get(name)]
        chosen = dataset_dicts[:: -(-len(dataset_dicts) // wanted)][comm.get_rank() :: comm.get_world_size()]
        mapper = DatasetMapper(self.cfg, True, augment=False)
        size = self.cfg.TEST.IMS_PER_BATCH
        for start in range(0, len(chosen), size):
            yield [mapper(entry) for entry in chosen[start : start + size]]

    def _save_last(self) -> None:
        save_checkpoint(
            self.run / "model_last.pth", {"model": self.bare_model.state_dict(), "trainer": self.state_dict()}
        )

    def _save_best(self) -> None:
        with self._evaluated_weights():
            checkpoint = {"model": self.bare_model.state_dict(), "iteration": self.iter, METRIC: self.best.best}
            save_checkpoint(self.run / "model_best.pth", checkpoint)


def evaluate(cfg: CfgNode, model: nn.Module, output_dir: Path | None) -> dict[str, float]:
    """Evaluates a model on `cfg.DATASETS.TEST`; all ranks take part.

    Args:
        cfg: configuration of the model.
        model: the model without a distributed wrapper.
        output_dir: where tables, curves and detections are written; None writes nothing.

    Returns:
        `AP50_11point`, `AP50`, `AP75` and `AP` as fractions on rank 0, means over several test sets; {} elsewhere.
    """
    results = []
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(
            DatasetCatalog.get(name),
            mapper=DatasetMapper(cfg, False),
            batch_size=cfg.TEST.IMS_PER_BATCH,
            num_workers=worker_count(cfg),
        )
        folder = output_dir if output_dir is None or len(cfg.DATASETS.TEST) == 1 else output_dir / name
        hidden = not comm.is_main_process() or not sys.stderr.isatty()
        loader = tqdm(loader, desc=name, unit="batch", leave=False, disable=hidden, dynamic_ncols=True)
        results.append(inference_on_dataset(model, loader, VOCEvaluator(name, folder)).get("bbox", {}))
    return {key: sum(result[key] for result in results) / len(results) for key in results[0]}


def setup_distributed() -> None:
    """Joins the processes that `tools.launch` started, over NCCL with GPUs and gloo without."""
    if "WORLD_SIZE" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))


def build_cfg(args: argparse.Namespace) -> tuple[CfgNode, str]:
    """The configuration that the command line asks for, not yet resolved, and the name of its run.

    Raises:
        UserError: data, weights or options are not what was expected.
    """
    # The sample is drawn once: the other processes wait and find it.
    if comm.get_rank() > 0:
        comm.synchronize()
    root, is_sample = resolve_data_root(args.data, ["VOC2007", "VOC2012"])
    if comm.get_rank() == 0:
        comm.synchronize()

    cfg = get_cfg()
    name = leaf_name(args.model, args.recipe)
    merge_file(cfg, CONFIGS / f"{name}.yaml")
    if is_sample:
        merge_file(cfg, CONFIGS / f"Sample-{args.model}.yaml")
        name += "-sample"
        logger.warning(
            "\n%s\nNo VOC data: %s holds the drawn SAMPLE, trained on with a configuration sized for it (%s).\n"
            "Its figures say nothing about Pascal VOC. Real data: make datasets, or DATA=path.\n%s",
            "=" * 100, root, f"Sample-{args.model}.yaml", "=" * 100,
        )  # fmt: skip
    cfg.DATASETS.ROOT = str(root)
    register_voc(root)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = default_splits(root)
    if args.weights:
        cfg.MODEL.WEIGHTS = args.weights
    elif not args.pretrained:
        cfg.MODEL.WEIGHTS = ""
    # The recipe is scaled to the processes; what the user asks for is taken as it is.
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    merge_options(cfg, args.opts)
    return cfg, name


def set_classes(cfg: CfgNode) -> None:
    """Takes the classes of the training data into the configuration of either detector."""
    cfg.MODEL.CLASSES = list(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.YOLOV3.NUM_CLASSES = len(cfg.MODEL.CLASSES)


def train(args: argparse.Namespace) -> Path:
    """Trains or resumes one run.

    Returns:
        The run folder.
    """
    run = create_run_folder(args.output, name_to_resume(args), resume=True) if args.resume else None
    has_begun = run is not None and (run / "config.yaml").exists()
    comm.synchronize()  # all have looked before rank 0 writes one
    if has_begun:
        cfg = read_run_cfg(run)
        cfg.DATASETS.ROOT = args.data or cfg.DATASETS.ROOT
        register_voc(Path(cfg.DATASETS.ROOT))
        merge_options(cfg, args.opts)
        check_datasets(cfg)
        check_classes(cfg, run)
    else:
        cfg, name = build_cfg(args)
        check_datasets(cfg)
        set_classes(cfg)
    cfg.MODEL.DEVICE = default_device()
    if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: expected a multiple of the {comm.get_world_size()} "
            "processes; give another NGPU or batch"
        )
    resolve_epochs(cfg, sum(len(DatasetCatalog.get(dataset)) for dataset in cfg.DATASETS.TRAIN))
    cfg.SEED = max(cfg.SEED, 0)
    cfg.freeze()

    if run is None:  # rank 0 makes the folder, or every process would make one
        run = comm.all_gather(create_run_folder(args.output, name, False) if comm.is_main_process() else None)[0]
    if comm.is_main_process():
        write_atomically(run / "config.yaml", lambda file: file.write(cfg.dump().encode()))
        setup_logging(run)
    try:
        trainer = Trainer(cfg, run, args.resume)
    except UserError:
        if comm.is_main_process() and not args.resume:
            shutil.rmtree(run)  # nothing has begun: leave no empty run behind
        raise
    is_terminal = comm.is_main_process() and sys.stderr.isatty()
    with (
        logging_redirect_tqdm([logging.getLogger(name) for name in LOGGERS])
        if is_terminal
        else contextlib.nullcontext()
    ):
        trainer.train()
    if comm.is_main_process():
        write_results(run)
        logger.info(
            "Best %s on %s: %.4f after iteration %d (chosen on that split). Everything is in %s",
            METRIC, ", ".join(cfg.DATASETS.TEST), trainer.best.best, trainer.best.best_iteration + 1, run,
        )  # fmt: skip
    return run


def eval_only(args: argparse.Namespace) -> None:
    """Evaluates weights and prints the table per class; the files go beside the weights.

    Raises:
        UserError: there are no weights, or data or classes do not fit them.
    """
    weights = Path(args.weights) if args.weights else newest_weights(args.output, args.model, args.recipe)
    if weights is None:
        raise UserError(f"{args.output}: no trained {LEAF[args.model]} in it; expected WEIGHTS=path, or train first")
    cfg, model = load_detector(weights)
    register_voc(Path(args.data or cfg.DATASETS.ROOT))
    if args.data:
        cfg.DATASETS.ROOT = args.data
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = default_splits(Path(args.data))
    merge_options(cfg, args.opts)
    check_datasets(cfg)
    check_classes(cfg, weights)
    folder = weights.parent / "evaluation"
    folder.mkdir(exist_ok=True)
    with recorded(folder, cfg, weights=str(weights)):
        metrics = evaluate(cfg, model, folder)
    if comm.is_main_process():
        logger.info(
            "%s on %s: %s; files in %s",
            weights, ", ".join(cfg.DATASETS.TEST),
            "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()), folder,
        )  # fmt: skip


def name_to_resume(args: argparse.Namespace) -> str:
    """Name of the runs whose newest RESUME=1 goes on with: of this model and recipe, on the data named or on any."""
    name = leaf_name(args.model, args.recipe)
    names = [name, f"{name}-sample"]
    if args.data:
        names = [names[resolve_data_root(args.data, [])[1]]]
    runs = [(run.stat().st_mtime, name) for name in names for run in find_run_folders(args.output, name)]
    return max(runs)[1] if runs else name


def recorded(folder: Path, cfg: CfgNode, **facts: object) -> contextlib.AbstractContextManager[None]:
    """`record_session` with the data of `cfg`, in the main process; nothing in the others."""
    if not comm.is_main_process():
        return contextlib.nullcontext()
    return record_session(folder, **data_facts(Path(cfg.DATASETS.ROOT)), test=list(cfg.DATASETS.TEST), **facts)


def newest_weights(output: Path, model: str, recipe: str) -> Path | None:
    """`model_best.pth` of the newest run of this model and recipe, on whatever data; None if there is none."""
    name = leaf_name(model, recipe)
    runs = find_run_folders(output, name) + find_run_folders(output, f"{name}-sample")
    found = [run / "model_best.pth" for run in runs if (run / "model_best.pth").exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def check_datasets(cfg: CfgNode) -> None:
    """Refuses datasets that the data root does not give.

    Raises:
        UserError: a name is unknown, or there is none.
    """
    known = [name for name in DatasetCatalog.list() if MetadataCatalog.get(name).get("evaluator_type") == "voc"]
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN), ("TEST", cfg.DATASETS.TEST)):
        if not names or not set(names) <= set(known):
            raise UserError(f"DATASETS.{key} {names}: expected one or more of {', '.join(known)}")


def check_classes(cfg: CfgNode, weights: Path) -> None:
    """Refuses data whose classes are not those of the weights.

    Raises:
        UserError: they differ.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        classes = list(MetadataCatalog.get(name).thing_classes)
        if classes != cfg.MODEL.CLASSES:
            raise UserError(
                f"{weights}: knows {len(cfg.MODEL.CLASSES)} classes ({', '.join(cfg.MODEL.CLASSES[:3])}, ...), "
                f"{name} in {cfg.DATASETS.ROOT} has {len(classes)} ({', '.join(classes[:3])}, ...); "
                "give the data that the weights were trained for"
            )


def setup_logging(run: Path | None = None) -> None:
    """Sends the lines of the project and of Detectron2 to the terminal or, given a run folder, to its `log.txt` too.

    Where a progress bar is on screen the lines that it replaces go to the file alone.
    """
    for name in LOGGERS:
        setup_logger(
            None if run is None else str(run),
            distributed_rank=comm.get_rank(),
            name=name,
            configure_stdout=run is None,
        )
        if run is None and sys.stderr.isatty():
            for handler in logging.getLogger(name).handlers:
                handler.addFilter(lambda record: not getattr(record, "is_progress", False))
    quiet = ["data.common", "engine.defaults", "engine.hooks"]  # our own lines say what these would
    if sys.stderr.isatty():
        quiet.append("evaluation.evaluator")  # and so does a progress bar
    for name in quiet:
        logging.getLogger(f"detectron2.{name}").setLevel(logging.WARNING)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Reads a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(LEAF), default="faster_rcnn")
    parser.add_argument("--recipe", choices=["best", "study"], default="best")
    parser.add_argument("--data", help="data root, or one folder in VOC layout; default datasets/, else the sample")
    parser.add_argument("--weights", help="file to start from, or to evaluate")
    parser.add_argument("--pretrained", type=int, choices=[0, 1], default=1, help="0 starts from random weights")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--resume", action="store_true", help="go on with the newest run of this name")
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs over the configuration")
    return parser.parse_args(argv)


@exits_on_user_error
def main() -> None:
    """Trains or evaluates in every process that was started."""
    args = parse_args(sys.argv[1:])
    setup_distributed()
    setup_logging()
    try:
        eval_only(args) if args.eval_only else train(args)
    except KeyboardInterrupt:
        logger.warning("Interrupted; RESUME=1 goes on from the last checkpoint")
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
