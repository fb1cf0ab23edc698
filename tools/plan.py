"""A study as a list of runs in a YAML file, and the command lines that it means.

    - name: plain                  # of the run's folder, which the seed is added to
      command: train-yolov3        # a target of make that trains or tells of what was trained
      recipe: study                # or config: own.yaml; without either RECIPE
      options: SOLVER.MAX_EPOCHS 5 # as OPTS of that target
      seeds: [0, 1, 2]             # without them SEEDS
    - name: plain-evaluated
      command: eval-yolov3
      of: [plain]                  # the run that it evaluates, all seeds; compare-detectors takes two

Also `start` of a training: as START of detectors or WEIGHTS of birds, or the name of a run above; `data` in place of
DATA; and `images`, photographs for commands that take them: an empty list means those of IMAGES.
"""

import os
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import UserError, first_line


class Command(NamedTuple):
    """A target of make.

    Attributes:
        words: for `python -m`.
        is_of_birds: or of detectors.
        num_sources: how many trained runs it evaluates; 0 for a training.
        images: how many it looks at, if not the whole test split; one seed is then enough.
    """

    words: tuple[str, ...]
    is_of_birds: bool = False
    num_sources: int = 0
    images: int | None = None


DETECT = ("tools.launch", "detection.train_net", "--model")
COMMANDS = {
    "finetune": Command(("tools.launch", "classification.train"), is_of_birds=True),
    "sweep": Command(("classification.sweep", "grid"), is_of_birds=True),
    "compare-pretraining": Command(("classification.sweep", "pretraining"), is_of_birds=True),
    "eval-classifier": Command(("classification.evaluate",), is_of_birds=True, num_sources=1),
    "train-frcnn": Command((*DETECT, "faster_rcnn")),
    "train-yolov3": Command((*DETECT, "yolov3")),
    "eval-frcnn": Command((*DETECT, "faster_rcnn", "--eval-only"), num_sources=1),
    "eval-yolov3": Command((*DETECT, "yolov3", "--eval-only"), num_sources=1),
    "visualize-proposals": Command(("tools.visualize_proposals",), num_sources=1, images=100),
    "compare-detectors": Command(("tools.compare_detectors",), num_sources=2, images=100),
}


@dataclass
class Entry:
    """One item of the list, as the head of this file describes it."""

    name: str = MISSING
    command: str = MISSING
    of: list[str] = field(default_factory=list)
    recipe: str | None = None
    config: str | None = None
    start: str | None = None
    data: str | None = None
    options: str = ""
    seeds: list[int] | None = None
    images: list[str] | None = None


@dataclass(frozen=True)
class Stage:
    """One command line.

    Attributes:
        name: what the progress display calls it.
        arguments: of `python -m`.
        seconds: what it may take: its share of the progress bar.
        run: the folder of a training, which shows that it has begun; None for what evaluates.
        resumes: whether it is then called with `--resume`.
        entry: the item of the list that it is of; stages that share it differ in their seed alone.
        needs: names of the trainings that it starts from or evaluates.
        images: test images that it looks at; None is all.
    """

    name: str
    arguments: list[str]
    seconds: float = 0.0
    run: Path | None = None
    resumes: bool = True
    entry: str = ""
    needs: tuple[str, ...] = ()
    images: int | None = None


def estimate_key(arguments: Sequence[str]) -> str:
    """What the estimate of a training is kept under: its arguments, and on how many GPUs where that is given."""
    gpus = os.environ.get("NGPU")
    return " ".join([*arguments, f"NGPU={gpus}"] if gpus else arguments)


def read_entries(path: Path) -> list[Entry]:
    """Reads a list of runs.

    Raises:
        UserError: the file is missing, no list, or an item of it is not what is expected.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a list of runs in YAML, see tools/studies/study.yaml")
    try:
        items: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException, OSError, RecursionError) as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{path}: expected a list of runs, each with name and command, see tools/studies/study.yaml")
    names = {str(item.get("name")) for item in items}
    entries: list[Entry] = []
    for number, item in enumerate(items, start=1):
        where = f"{path}: item {number}"
        try:
            entry = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Entry), item))
        except (OmegaConfBaseException, TypeError, RecursionError) as error:
            key = getattr(error, "full_key", None)
            reason = first_line(error)
            known = ", ".join(Entry.__dataclass_fields__)
            raise UserError(f"{where}: {key + ': ' if key else ''}{reason}; the keys are: {known}") from None
        assert isinstance(entry, Entry), "it is merged into one"
        _check(entry, entries, names, where)
        entries.append(entry)
    return entries


def _check(entry: Entry, before: Sequence[Entry], names: Collection[str], where: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", entry.name):
        raise UserError(f"{where}: name {entry.name!r}: expected letters, digits, dots, - and _, as of a folder")
    where = f"{where}, {entry.name}"
    if entry.name in (other.name for other in before):
        raise UserError(f"{where}: the name is taken; expected another one for each")
    command = COMMANDS.get(entry.command)
    if command is None:
        raise UserError(f"{where}: command {entry.command}: expected one of {', '.join(COMMANDS)}")
    trained = {other.name: COMMANDS[other.command] for other in before if not COMMANDS[other.command].num_sources}
    if len(entry.of) != command.num_sources:
        raise UserError(f"{where}: of names {len(entry.of)} runs; {entry.command} expects {command.num_sources}")
    for name in entry.of:
        source = trained.get(_parts(name)[0])
        if source is None or source.is_of_birds != command.is_of_birds:
            kind = "birds" if command.is_of_birds else "detectors"
            raise UserError(f"{where}: of {name}: expected a training of {kind} that stands above it")
    if entry.start and _parts(entry.start)[0] in names and _parts(entry.start)[0] not in trained:
        raise UserError(f"{where}: start {entry.start}: expected a training that stands above it")
    for key in ("recipe", "config", "start", "seeds"):
        if command.num_sources and getattr(entry, key) is not None:
            raise UserError(f"{where}: {key}: {entry.command} trains nothing; the runs that it is of say it")
    if entry.images is not None and command.images is None:
        raise UserError(f"{where}: images: {entry.command} takes none")
    if entry.recipe and entry.config:
        raise UserError(f"{where}: recipe and config: expected one of them")
    if entry.seeds is not None and (not entry.seeds or min(entry.seeds) < 0 or len({*entry.seeds}) < len(entry.seeds)):
        raise UserError(f"{where}: seeds {entry.seeds}: expected one or more different whole numbers, 0 or more")
    try:
        words = shlex.split(entry.options)
    except ValueError as error:
        raise UserError(f"{where}: options {entry.options!r}: {error}") from None
    if any(word == "SEED" or word.startswith("seed=") for word in words):
        raise UserError(f"{where}: options name a seed; expected it in seeds, which the name of the run tells")


def list_stages(
    entries: Sequence[Entry],
    output: Path,
    data: Path,
    *,
    recipe: str | None = None,
    fallback: str | None = None,
    start: str | None = None,
    seeds: Sequence[int] = (0,),
    images: Sequence[str] = (),
) -> list[Stage]:
    """The command lines of a list, in its order, each training once a seed.

    Args:
        entries: see `read_entries`.
        output: folder of all runs.
        data: root of the data of items that name none.
        recipe: of trainings that name none.
        fallback: the recipe where `recipe` is None, except for detectors that are given a start of their own. Without
            either the command has its own.
        start: of the detectors that name none.
        seeds: of trainings that name none.
        images: of items with an empty list of them; such items are left out where these are none.
    """
    seeds_of = {entry.name: entry.seeds or [*seeds] for entry in entries}
    data_of = {entry.name: entry.data or str(data) for entry in entries}

    def stage_of(name: str, seed: int) -> str:
        """Name of the training of that seed, or of the first where it has not this one."""
        entry = _parts(name)[0]
        return f"{entry}-seed{seed if seed in seeds_of[entry] else seeds_of[entry][0]}"

    def run(name: str, seed: int) -> Path:
        """Its folder."""
        return output / stage_of(name, seed) / _parts(name)[1]

    def training(entry: Entry, seed: int) -> Stage:
        command, folder = COMMANDS[entry.command], run(entry.name, seed)
        options, root = shlex.split(entry.options), data_of[entry.name]
        begins = entry.start or (None if command.is_of_birds else start)
        default = recipe or (fallback if command.is_of_birds or not begins else None)
        named = entry.recipe or (None if entry.config else default)
        needs: tuple[str, ...] = ()
        if begins and _parts(begins)[0] in seeds_of:
            needs = (stage_of(begins, seed),)
            begins = str(run(begins, seed) / "model_best.pth")
        into = ["--name", folder.name, "--output", str(output)]
        if command.is_of_birds:
            settings = [f"data={root}", *([f"weights={begins}"] if begins else []), *options, f"seed={seed}"]
            words = [*filter(None, (named, entry.config)), *settings, *into]
        else:
            given = (("--recipe", named), ("--config", entry.config), ("--data", root), ("--start", begins))
            words = [word for flag, value in given if value for word in (flag, value)]
            words += [*into, *options, "SEED", str(seed)]
        resumes = "sweep" not in command.words[0]
        arguments = [*command.words, *words]
        return Stage(folder.name, arguments, run=folder, resumes=resumes, entry=entry.name, needs=needs)

    def evaluation(entry: Entry, seed: int) -> Stage:
        command, sources = COMMANDS[entry.command], [str(run(name, seed)) for name in entry.of]
        if command.is_of_birds:
            words = [f"{sources[0]}/model_best.pth", "--data", entry.data or data_of[_parts(entry.of[0])[0]]]
        elif command.num_sources == 1:
            words = ["--start", sources[0], *(["--data", entry.data] if entry.data else [])]
        else:
            words = ["--frcnn", sources[0], "--yolov3", sources[1], "--out", str(output / entry.name)]
            words += ["--data", entry.data] if entry.data else []
        words += [*shlex.split(entry.options), *(entry.images or (images if entry.images is not None else ()))]
        name = entry.name if command.images else f"{entry.name}-seed{seed}"
        needs = tuple(stage_of(name, seed) for name in entry.of)
        return Stage(name, [*command.words, *words], entry=entry.name, needs=needs, images=command.images)

    stages = []
    for entry in entries:
        if entry.of and (entry.images != [] or images):
            own = seeds_of[_parts(entry.of[0])[0]]
            stages += [evaluation(entry, seed) for seed in (own[:1] if COMMANDS[entry.command].images else own)]
        elif not entry.of:
            stages += [training(entry, seed) for seed in seeds_of[entry.name]]
    return stages


def _parts(name: str) -> tuple[str, str]:
    """Of a run inside another's folder, such as pretraining/random: the item of the list, and the rest."""
    entry, _, inside = name.partition("/")
    return entry, inside
