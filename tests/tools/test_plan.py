"""Lists of runs: what a file may hold, the command lines that it means, and what each line is refused for."""

import json
from pathlib import Path

import pytest

from classification.train import parse_request, resolve
from common.errors import UserError
from detection.experiment import new_experiment
from detection.train_net import parse_args
from tests.birds import draw_birds
from tests.tools.scenes import draw_voc
from tools import study
from tools.plan import Stage, list_stages, read_entries
from tools.study import STUDIES

ROOT = Path(__file__).resolve().parents[2]
TRAIN = {"name": "a", "command": "train-yolov3"}
FINETUNE = {"name": "b", "command": "finetune"}


def stages_of(tmp_path: Path, items: list[dict], **given) -> dict[str, Stage]:
    path = tmp_path / "list.yaml"
    path.write_text(json.dumps(items))  # JSON is YAML
    return {stage.name: stage for stage in list_stages(read_entries(path), Path("o"), Path("data"), **given)}


def test_every_training_runs_once_a_seed_and_so_does_its_evaluation(tmp_path: Path) -> None:
    items = [
        {**TRAIN, "options": "SOLVER.STEPS '(5, 9)'"},
        {"name": "a-evaluated", "command": "eval-yolov3", "of": ["a"]},
        {"name": "other", "command": "train-frcnn", "seeds": [7]},
        {"name": "ahead", "command": "compare-detectors", "of": ["other", "a"]},
    ]
    stages = stages_of(tmp_path, items, seeds=[1, 2])
    assert list(stages) == ["a-seed1", "a-seed2", "a-evaluated-seed1", "a-evaluated-seed2", "other-seed7", "ahead"]
    args = parse_args(stages["a-seed2"].arguments[2:])
    assert (args.model, args.name, args.output) == ("yolov3", "a-seed2", Path("o"))
    assert args.opts == ["SOLVER.STEPS", "(5, 9)", "SEED", "2"]
    assert stages["a-seed2"].run == Path("o/a-seed2")
    assert parse_args(stages["a-evaluated-seed2"].arguments[2:]).start == "o/a-seed2"
    ahead = stages["ahead"].arguments
    assert [ahead[ahead.index(flag) + 1] for flag in ("--frcnn", "--yolov3")] == ["o/other-seed7", "o/a-seed1"]
    assert "--data" not in ahead


def test_two_are_compared_on_the_data_that_is_named(tmp_path: Path) -> None:
    pair = {"name": "pair", "command": "compare-detectors", "of": ["a", "a"], "data": "elsewhere"}
    ahead = stages_of(tmp_path, [TRAIN, pair])["pair"].arguments
    assert ahead[ahead.index("--data") + 1] == "elsewhere"


def test_a_run_starts_from_another_of_the_list_of_its_own_seed_where_there_is_one(tmp_path: Path) -> None:
    items = [
        {**FINETUNE, "seeds": [0, 1]},
        {"name": "c", "command": "finetune", "start": "b", "seeds": [1, 2], "data": "elsewhere", "recipe": "study"},
        {"name": "pair", "command": "compare-pretraining", "start": "c"},
        {"name": "told", "command": "eval-classifier", "of": ["pair/random"]},
        {"name": "elsewhere-told", "command": "eval-classifier", "of": ["c"]},
    ]
    stages = stages_of(tmp_path, items)
    for seed, source in ((1, "o/b-seed1/model_best.pth"), (2, "o/b-seed0/model_best.pth")):
        request = parse_request(
            stages[f"c-seed{seed}"].arguments[2 : stages[f"c-seed{seed}"].arguments.index("--name")]
        )
        assert request.recipe == "study"
        assert request.changes == ["data=elsewhere", f"weights={source}", f"seed={seed}"]
    assert "weights=o/c-seed1/model_best.pth" in stages["pair-seed0"].arguments
    assert "o/pair-seed0/random/model_best.pth" in stages["told-seed0"].arguments
    assert stages["told-seed0"].arguments[-1] == "data"
    assert stages["elsewhere-told-seed2"].arguments[-1] == "elsewhere"
    needs = {name: stage.needs for name, stage in stages.items() if not name.startswith("elsewhere")}
    assert needs == {
        **{"b-seed0": (), "b-seed1": (), "c-seed1": ("b-seed1",), "c-seed2": ("b-seed0",)},
        **{"pair-seed0": ("c-seed1",), "told-seed0": ("pair-seed0",)},
    }


def test_start_and_recipe_reach_the_trainings_that_name_none(tmp_path: Path) -> None:
    own = {"name": "own", "command": "train-frcnn", "start": "random", "recipe": "sgd"}
    file = {"name": "file", "command": "train-frcnn", "config": "own.yaml"}
    for given, recipe, bird in (({}, None, "study"), ({"recipe": "best"}, "best", "best")):
        stages = stages_of(tmp_path, [TRAIN, own, file, FINETUNE], start="coco", fallback="study", **given)
        args = {name: parse_args(stages[f"{name}-seed0"].arguments[2:]) for name in ("a", "own", "file")}
        assert (args["a"].start, args["a"].recipe) == ("coco", recipe)  # without RECIPE it is that of the start
        assert (args["own"].start, args["own"].recipe) == ("random", "sgd")
        assert (args["file"].config, args["file"].recipe) == (Path("own.yaml"), None)
        assert stages["b-seed0"].arguments[2] == bird
        assert not any("coco" in word for word in stages["b-seed0"].arguments)
    assert parse_args(stages_of(tmp_path, [TRAIN], fallback="study")["a-seed0"].arguments[2:]).recipe == "study"


def test_photographs_are_those_of_the_list_or_those_given_or_the_item_is_left_out(tmp_path: Path) -> None:
    compare = {"name": "both", "command": "compare-detectors", "of": ["a", "a"]}
    assert stages_of(tmp_path, [TRAIN, {**compare, "images": []}]).keys() == {"a-seed0"}
    for own, expected in (([], ["x.jpg", "y.jpg"]), (["z.jpg"], ["z.jpg"])):
        stages = stages_of(tmp_path, [TRAIN, {**compare, "images": own}], images=["x.jpg", "y.jpg"])
        assert [word for word in stages["both"].arguments if word.endswith(".jpg")] == expected
    assert stages_of(tmp_path, [TRAIN, compare], images=["x.jpg"])["both"].arguments[-1] == "o/both"  # a test split


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- name: [unclosed", "is no YAML"),
        ("name: a", "expected a list of runs"),
        ("", "expected a list of runs"),
        ("- train-yolov3", "expected a list of runs"),
        ("- {command: finetune}", "item 1: .*name"),
        ("- {name: a}", "item 1: .*command"),
        ("- {name: a, command: make-tea}", "item 1, a: command make-tea: expected one of finetune, "),
        ("- {name: a/b, command: finetune}", "name 'a/b': expected letters"),
        ("- {name: a, command: finetune, rate: 3}", "rate: .*; the keys are: name, command, "),
        ("- {name: a, command: finetune, seeds: often}", "seeds: .*; the keys are"),
        ("- {name: a, command: finetune, seeds: [1, 1]}", r"seeds \[1, 1\]: expected one or more different"),
        ("- {name: a, command: finetune, seeds: []}", r"seeds \[\]: expected one or more"),
        ("- {name: a, command: finetune, options: lr=1 seed=3}", "options name a seed"),
        ("- {name: a, command: train-frcnn, options: SEED 3}", "options name a seed"),
        ('- {name: a, command: finetune, options: "\'open"}', "options .*: No closing quotation"),
        ("- {name: a, command: train-frcnn, recipe: best, config: own.yaml}", "recipe and config: expected one"),
        ("- {name: a, command: finetune}\n- {name: a, command: finetune}", "item 2, a: the name is taken"),
        ("- &a {name: a, command: finetune, data: *a}", "recursion"),
        ("- {name: a, command: eval-frcnn}", "of names 0 runs; eval-frcnn expects 1"),
        ("- {name: a, command: eval-frcnn, of: [b]}", "of b: expected a training of detectors that stands above it"),
        ("- {name: a, command: finetune}\n- {name: b, command: eval-frcnn, of: [a]}", "of a: expected a training of d"),
        ("- {name: a, command: finetune}\n- {name: b, command: finetune, of: [a]}", "of names 1 runs; finetune exp"),
        ("- {name: a, command: train-frcnn, images: [b.jpg]}", "images: train-frcnn takes none"),
        ("- {name: a, command: finetune, start: a}", "a: start a: expected a training that stands above it"),
        ("- {name: a, command: finetune, start: b/c}\n- {name: b, command: sweep}", "start b/c: expected a training"),
        (
            "- {name: a, command: finetune}\n- {name: b, command: eval-classifier, of: [a], recipe: best}",
            "recipe: eval-classifier trains nothing",
        ),
    ],
)
def test_a_bad_list_is_refused_in_one_line(
    tmp_path: Path, text: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as error:
        read_entries(path)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(SystemExit) as stopped:
        study.main(["--study", str(path), "--output", str(tmp_path / "o")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("seeds", ["", "a", "0 0", "-1", "1.5"])
def test_bad_seeds_are_refused_in_one_line(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        study.main(["--seeds", seeds, "--plan"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: SEEDS={seeds}: expected")


@pytest.mark.parametrize("path", [ROOT / "docs" / "ablation.yaml", *STUDIES.glob("*.yaml")], ids=lambda path: path.stem)
def test_the_lists_that_are_here_name_recipes_and_options_that_exist(path: Path, tmp_path: Path) -> None:
    """Each training is taken as far as its settings."""
    draw_voc(tmp_path)
    draw_birds(tmp_path)
    for stage in list_stages(read_entries(path), Path("output"), tmp_path):
        module, *words = stage.arguments[stage.arguments[0] == "tools.launch" :]
        if stage.run is None:
            continue
        if module == "detection.train_net":
            experiment = new_experiment(parse_args(words))
            assert int(stage.name.rpartition("-seed")[2]) == experiment.cfg.SEED
        else:
            arguments = words[module == "classification.sweep" : words.index("--name")]
            settings = [word for word in arguments if not word.startswith("data=")]
            recipe = resolve(parse_request([f"data={tmp_path}", *_without_flags(settings)]))[1]
            assert recipe.seed == int(stage.name.rpartition("-seed")[2])


def _without_flags(words: list[str]) -> list[str]:
    """Without `--lrs` and `--epochs`, which the sweep itself takes, and their values."""
    flags = {number for number, word in enumerate(words) if word.startswith("--")}
    return [word for number, word in enumerate(words) if number not in flags and number - 1 not in flags]
