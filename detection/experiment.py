"""What a command line asks for: a configuration with its data and classes, and the run that it is about."""

import argparse
import logging
import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from common.data_root import data_facts, resolve_data_root
from common.errors import UserError
from common.processes import on_main_process, world_size
from common.run_folder import find_run_folders, newest_weights, record_session, run_to_resume
from common.runtime import default_device
from detection.config import (
    CONFIGS,
    META_ARCHITECTURES,
    NAMES,
    at_least_one,
    get_cfg,
    leaf_name,
    merge_file,
    merge_options,
    read_run_cfg,
    value_of,
)
from detection.data_checks import check_classes, check_datasets, check_pictures
from detection.schedule import resolve_schedule, scale_to_processes
from detection.starts import (
    compute_as_darknet,
    identify,
    resolve_start,
    run_of,
    set_classes,
    unfreeze_backbone,
    use_backbone,
)
from detection.voc import OFFICIAL_FOLDERS, default_test, default_train, register_voc
from detection.voc_lists import present_splits

logger = logging.getLogger(__name__)

FROM_DATA = ("MODEL.CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.YOLOV3.NUM_CLASSES")
# Keys that a resumed run may change: none that would change the network, what the training stream has at a position, or
# the optimizer's parameter groups. Entries that end in a dot or a _ are prefixes.
MAY_CHANGE = (
    *("SOLVER.BASE_LR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.GAMMA", "SOLVER.STEPS", "SOLVER.STEPS_EPOCHS"),
    *("SOLVER.MAX_", "SOLVER.WEIGHT_DECAY"),
    *("SOLVER.WARMUP_", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.CLIP_GRADIENTS.", "SOLVER.ACCUMULATE"),
    *("SOLVER.CHECKPOINT_PERIOD", "SOLVER.LOG_PERIOD", "SOLVER.BASE_LR_END", "SOLVER.NUM_DECAYS"),
    *("SOLVER.RESCALE_INTERVAL", "TEST.", "DATASETS.TEST", "DATASETS.ROOT", "DATALOADER.NUM_WORKERS"),
    *("INPUT.CLOSE_", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.PRECISION", "MODEL.CHANNELS_LAST"),
    *("MODEL.DEVICE", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "CUDNN_BENCHMARK"),
    *("MODEL.YOLOV3.SCORE_THRESH_TEST", "MODEL.YOLOV3.NMS_THRESH_TEST", "MODEL.YOLOV3.TOPK_CANDIDATES_TEST"),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", "MODEL.RPN.POST_NMS_TOPK_TEST"),
)


@dataclass
class Experiment:
    """A configuration on the way to a run.

    Attributes:
        cfg: the configuration.
        name: of the run, without a number.
        recipe: the configuration before the user changed it.
        options: keys that OPTS sets.
        leaf: where there is a file of the user's own, what it makes of the recipe before OPTS, and the keys that it
            sets.
    """

    cfg: CfgNode
    name: str
    recipe: CfgNode
    options: list[str] = field(default_factory=list)
    leaf: tuple[CfgNode, list[str]] | None = None

    @property
    def given(self) -> list[str]:
        """All keys that the user has set."""
        return [*(self.leaf[1] if self.leaf else ()), *self.options]

    def resolve(self) -> None:
        """Takes the classes from the data, and fits the schedule to it.

        Raises:
            UserError: data, classes or batch do not fit.
        """
        cfg = self.cfg
        check_datasets(cfg)
        set_classes(cfg, MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes)
        on_main_process(check_pictures, cfg, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        num_images = sum(len(DatasetCatalog.get(dataset)) for dataset in cfg.DATASETS.TRAIN)
        resolve_schedule(cfg, self.recipe, self.options, num_images, self.leaf)
        if cfg.SOLVER.IMS_PER_BATCH % (world_size() * at_least_one(cfg, "SOLVER.ACCUMULATE")):
            raise UserError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: expected a multiple of the {world_size()} "
                f"processes times SOLVER.ACCUMULATE {cfg.SOLVER.ACCUMULATE}; give another NGPU or batch"
            )
        if cfg.SEED < 0:
            raise UserError(f"SEED {cfg.SEED}: expected 0 or more, so that the run can be repeated and resumed")
        if cfg.INPUT.MIXUP_PROB and cfg.MODEL.META_ARCHITECTURE != "YOLOv3":
            raise UserError(
                f"INPUT.MIXUP_PROB {cfg.INPUT.MIXUP_PROB:g}: {NAMES[cfg.MODEL.META_ARCHITECTURE]} would learn the "
                "objects of the fainter image at full weight; YOLOv3 alone knows their weights: leave it out"
            )


def new_experiment(args: argparse.Namespace) -> Experiment:
    """The experiment that a command line asks for, not resolved yet.

    The order matters: the file, then the data, then what it starts from, then the scaling to the processes, and last
    what the user asks for, which is taken as it is.

    Args:
        args: `model`, `recipe` or `config`, `data`, `start`, `pretrained`, `backbone` and `opts`.

    Raises:
        UserError: data, weights or options are not what was expected.
    """
    root, is_sample = on_main_process(resolve_data_root, args.data, OFFICIAL_FOLDERS.values())
    path, is_whole = configuration_file(args)
    cfg = get_cfg()
    bases, set_by_file = merge_file(cfg, path)
    # The world size is read before the scaling alone; what a recipe sets is not the user's doing.
    set_by_file = [key for key in set_by_file if key != "SOLVER.REFERENCE_WORLD_SIZE"] if args.config else []
    if is_sample:
        # The weights of a third-party detector have no place in the small network.
        _use_sample(cfg, root, path, CONFIGS / f"Sample-{args.model}.yaml", is_small=not args.config and not is_whole)
    check_meta_architecture(cfg, args.model, path)
    _use_data(cfg, root, [*set_by_file, *args.opts[::2]])
    _use_start(cfg, args, is_whole, is_sample)

    asked = cfg.clone()
    merge_options(asked, args.opts)
    processes = world_size() * max(asked.SOLVER.ACCUMULATE, 1)
    recipe = scale_to_processes(bases if args.config else cfg.clone(), processes)
    cfg = scale_to_processes(cfg, processes)
    if "MODEL.DEVICE" not in set_by_file:
        cfg.MODEL.DEVICE = default_device()
    leaf = (cfg.clone(), set_by_file) if args.config else None
    options = _merge_options(cfg, args.opts)
    check_meta_architecture(cfg, args.model, "OPTS")
    if not cfg.MODEL.WEIGHTS:
        unfreeze_backbone(cfg, [*set_by_file, *options])
    names = run_names(args)
    return Experiment(cfg, names[-1] if is_sample else names[0], recipe, options, leaf)


def _use_sample(cfg: CfgNode, root: Path, path: Path, small: Path, is_small: bool) -> None:
    """Warns that the drawn sample is used, and merges the configuration sized for it if `is_small`."""
    if is_small:
        merge_file(cfg, small)
    logger.warning(
        "\n%s\nNo VOC data: %s holds the drawn SAMPLE, taken with %s.\n"
        "Its figures say nothing about Pascal VOC. Real data: make datasets, or DATA=path.\n%s",
        *("=" * 100, root, f"a configuration sized for it ({small.name})" if is_small else path.name, "=" * 100),
    )


def _use_data(cfg: CfgNode, root: Path, given: Collection[str]) -> None:
    """Registers the data of a root, and chooses its splits where the user has not."""
    cfg.DATASETS.ROOT = str(root)
    register_voc(root)
    if "DATASETS.TRAIN" not in given:
        cfg.DATASETS.TRAIN = default_train(root)
    if "DATASETS.TEST" not in given:
        cfg.DATASETS.TEST = default_test(root)
    if cfg.DATASETS.TRAIN == ("voc_train",) and cfg.DATASETS.TEST == ("voc_test",) and "val" in present_splits(root):
        logger.info(
            "%s: has val beside train and test; nothing is trained on it, and DATASETS.TEST '[voc_val]' in OPTS would "
            "choose on it",
            root,
        )


def _use_start(cfg: CfgNode, args: argparse.Namespace, is_whole: bool, is_sample: bool) -> None:
    """Sets the backbone and the weights to start from, and what follows from them."""
    if args.start == "imagenet" and not args.pretrained:
        raise UserError("START=imagenet and PRETRAINED=0: expected one of them")
    if is_whole and args.backbone:
        raise UserError(f"START={args.start}: is a whole detector; leave BACKBONE={args.backbone} out, or START")
    if args.backbone:
        use_backbone(cfg, args.backbone)
    start = resolve_start(args.start or ("imagenet" if args.pretrained else "random"), args.model)
    if start and (run := run_of(start)) and not (args.config or args.backbone):
        # The weights of a run fit no other network than its own.
        cfg.MODEL = on_main_process(read_run_cfg, run).MODEL
        check_meta_architecture(cfg, args.model, run)
    if start is not None:
        cfg.MODEL.WEIGHTS = start
        if not is_whole:
            compute_as_darknet(cfg)
    elif args.start and not cfg.MODEL.WEIGHTS:
        raise UserError(
            f"START={args.start}: the configuration{' of the drawn sample' if is_sample else ''} names no weights; "
            "expected MODEL.WEIGHTS in it: leave START out to begin with random ones"
        )


def configuration_file(args: argparse.Namespace) -> tuple[Path, bool]:
    """The configuration that a command line means, and whether it is that of a third-party detector.

    It is the user's own file, the leaf of the recipe, or, where no recipe is named, the leaf of the whole detector to
    start from.
    """
    start = resolve_start(args.start, args.model) if args.start else None
    found = identify(start) if start else None
    if args.config:
        return args.config, bool(found)
    leaf = found.leaf if found and not args.recipe else leaf_name(args.model, args.recipe or "best")
    return CONFIGS / f"{leaf}.yaml", bool(found)


def resumed_experiment(args: argparse.Namespace, run: Path) -> Experiment:
    """The experiment of a run that has begun, with what the command line changes.

    Raises:
        UserError: an option would change the network or the training stream, which a resumed run cannot.
    """
    recipe = on_main_process(read_run_cfg, run)
    check_meta_architecture(recipe, args.model, run)
    if args.data:
        recipe.DATASETS.ROOT = str(resolve_data_root(args.data, [])[0])
    register_voc(Path(recipe.DATASETS.ROOT))
    cfg = recipe.clone()
    if args.start and resolve_start(args.start, args.model) not in (None, recipe.MODEL.WEIGHTS):
        raise UserError(f"{args.start}: {run} goes on from its own model_last.pth; leave START or RESUME=1 out")
    given = _merge_options(cfg, args.opts)
    beginnings = tuple(name for name in MAY_CHANGE if name.endswith((".", "_")))
    for key in given:
        old, new = value_of(recipe, key), value_of(cfg, key)
        if old != new and key not in MAY_CHANGE and not key.startswith(beginnings):
            raise UserError(
                f"{run}: {key} was {old}, asked for is {new}: another network, or another training stream, which no "
                "resumed run can have; leave it out, or start a new run without RESUME=1"
            )
    check_datasets(cfg)
    check_classes(cfg, run)
    return Experiment(cfg, run.name, recipe, given)


def check_meta_architecture(cfg: CfgNode, model: str, source: object) -> None:
    """Refuses a configuration of the other detector.

    Raises:
        UserError: it is one; the message names `source`.
    """
    expected = META_ARCHITECTURES[model]
    if cfg.MODEL.META_ARCHITECTURE not in expected:
        raise UserError(
            f"{source}: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, expected {' or '.join(expected)} "
            "here: run the target of the other detector"
        )


def _merge_options(cfg: CfgNode, options: Sequence[str]) -> list[str]:
    given = merge_options(cfg, options)
    if from_data := [key for key in given if key in FROM_DATA]:
        raise UserError(f"OPTS: {from_data[0]} comes from the data; name the classes in its labels.txt, one a line")
    return given


def run_names(args: argparse.Namespace) -> list[str]:
    """Names that a command line's runs may have: on data and, unless the configuration is the user's, on the sample."""
    return _names(configuration_file(args)[0].stem, args.backbone, is_own=bool(args.config))


def _names(configuration: str, backbone: str | None, is_own: bool) -> list[str]:
    name = f"{configuration}_{backbone}" if backbone else configuration
    return [name] if is_own else [name, f"{name}-sample"]


def newest_run(args: argparse.Namespace) -> Path:
    """The run of the name that is given, or else the newest of this model and recipe, on the data named or on any.

    Raises:
        UserError: there is none.
    """
    names = run_names(args)
    if args.data:
        _, is_sample = resolve_data_root(args.data, [])
        names = names[-1:] if is_sample else names[:1]
    return run_to_resume(args.output, names, args.name)


def newest_detector(
    output: Path, model: str, recipe: str | None = None, config: Path | None = None, backbone: str | None = None
) -> Path | None:
    """`model_best.pth` of the newest run of a model; None if there is none.

    Args:
        output: folder of all runs.
        model: see `detection.config.LEAF`.
        recipe: only runs of this recipe.
        config: only runs of this configuration of one's own.
        backbone: only runs with this network in place of the recipe's.
    """
    if config or recipe or backbone:
        configuration = config.stem if config else leaf_name(model, recipe or "best")
        names = _names(configuration, backbone, is_own=bool(config))
        return newest_weights(run for name in names for run in find_run_folders(output, name))
    wanted = re.compile(rf"^  META_ARCHITECTURE: ({'|'.join(META_ARCHITECTURES[model])})$", re.MULTILINE)
    configurations = [path for path in output.glob("*/config.yaml") if wanted.search(path.read_text(errors="replace"))]
    return newest_weights(path.parent for path in configurations)


def recorded(folder: Path, cfg: CfgNode, **facts: object) -> AbstractContextManager[None]:
    """`record_session` with the data of `cfg`."""
    return record_session(folder, **data_facts(Path(cfg.DATASETS.ROOT)), test=list(cfg.DATASETS.TEST), **facts)


def use_test_data(cfg: CfgNode, data: str | None, given: Collection[str] = ()) -> None:
    """Sets in `cfg` and registers what a detector is tested on.

    Without `data`, that is the test data of the detector's own run; with `data`, or for a detector that was not trained
    here, it is the default of the data root.

    Args:
        cfg: of the detector, changed in place.
        data: the data root that the user named.
        given: keys that the user has set.

    Raises:
        UserError: the data is not there.
    """
    if data or not cfg.DATASETS.ROOT:
        is_default = "DATASETS.TEST" not in given
        needed = [OFFICIAL_FOLDERS["voc07"]] if is_default else None
        root, _ = on_main_process(resolve_data_root, data, [*OFFICIAL_FOLDERS.values()], needed)
        cfg.DATASETS.ROOT = str(root)
        if is_default:
            cfg.DATASETS.TEST = default_test(root)
    register_voc(Path(cfg.DATASETS.ROOT))
