"""Settings keep their word: what a resumed run may change takes effect, and what cannot be is refused in one line."""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from classification import evaluate, sweep, train
from classification.model import build_model
from classification.predict import data_of_run
from classification.recipe import Recipe, load_recipe
from classification.run import Run, build_trainer
from common.errors import Interrupted
from common.run_folder import read_metrics
from tests.birds import draw_birds
from tests.classification.runs import assert_same_runs, ended, goes_on, start, words


@pytest.fixture(scope="module")
def finished(tmp_path_factory, kept_root) -> Path:
    """A run of two epochs of three iterations, at the constant rate 0.05."""
    output = tmp_path_factory.mktemp("finished")
    assert ended(start(words(kept_root, output, "run", epochs=2), output / "said.txt")) == [0]
    return output / "run"


@pytest.fixture
def resume(finished, tmp_path, run_main):
    """Resumes a copy of the finished run with some changes; returns what `run_main` does."""
    shutil.copytree(finished, tmp_path / "run")
    return lambda *changes: run_main(train.main, *goes_on(tmp_path, "run", *changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def groups(run: Path) -> list[dict]:
    """Of the optimizer in the last checkpoint: the head, then all else."""
    return torch.load(run / "model_last.pth", weights_only=True)["trainer"]["optimizer"]["param_groups"]


def rates(run: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(run)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("epochs=3 lr=0.01", [0.05, 0.05, 0.01]),
        ("epochs=4 schedule=cosine", [0.05, 0.05, *(0.025 * (1 + math.cos(math.pi * i / 12)) for i in (8, 11))]),
        ("epochs=4 schedule=multistep milestones=[3]", [0.05, 0.05, 0.05, 0.005]),
        ("epochs=3 precision=float16", [0.05, 0.05, 0.05]),
    ],
)
def test_rate_schedule_and_length_of_a_resumed_run(resume, tmp_path, changes, expected):
    code, _, complaint = resume(*changes.split())
    assert code == 0, complaint
    assert rates(tmp_path / "run") == pytest.approx(expected)
    assert groups(tmp_path / "run")[0]["lr"] == pytest.approx(expected[-1])
    recipe = load_recipe(tmp_path / "run" / "config.yaml")
    asked = dict(change.split("=") for change in changes.split())
    assert recipe.epochs == int(asked["epochs"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == recipe.epochs


def test_decay_and_momentum_of_a_resumed_run(resume, tmp_path):
    code, _, complaint = resume("epochs=3", "weight_decay=0.25", "momentum=0.5")
    assert code == 0, complaint
    for group in groups(tmp_path / "run"):
        assert (group["weight_decay"], group["momentum"], group["lr"]) == (0.25, 0.5, 0.05)


def test_decay_of_a_resumed_run_moves_its_weights(resume, tmp_path):
    """At this rate the gradient does next to nothing, and each step shrinks the weights by lr x decay."""
    before = torch.load(tmp_path / "run" / "model_last.pth", weights_only=True)["model"]["fc.weight"]
    assert resume("epochs=3", "lr=1e-7", "weight_decay=1e6", "momentum=0", "clip_grad=0")[0] == 0
    after = torch.load(tmp_path / "run" / "model_last.pth", weights_only=True)["model"]["fc.weight"]
    torch.testing.assert_close(after, before * 0.9**3, atol=1e-4, rtol=1e-3)


def test_patience_of_a_resumed_run(resume, tmp_path):
    code, _, complaint = resume("epochs=30", "patience=1", "lr=1e-12")
    assert code == 0, complaint
    top1 = [row["validation_top1"] for row in read_metrics(tmp_path / "run")]
    assert 2 <= len(top1) < 30
    rises = [new > max(top1[:epoch], default=-1) for epoch, new in enumerate(top1)]
    assert not rises[-1]
    assert all(rises[2:-1])


def test_a_run_that_goes_on_has_no_result_until_its_new_end(resume, finished, tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        raise Interrupted

    assert (finished / "result.json").exists()
    monkeypatch.setattr(Run, "_train_epoch", interrupted)
    assert resume("epochs=2")[0] == 0  # there is nothing left to train
    assert (tmp_path / "run" / "result.json").exists()
    assert resume("epochs=4")[0] == 130
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_longer_run_is_the_one_that_was_longer_from_the_beginning(resume, kept_root, tmp_path, run_main):
    assert resume("epochs=4")[0] == 0
    assert run_main(train.main, *words(kept_root, tmp_path, "four", epochs=4))[0] == 0
    assert_same_runs(tmp_path / "run", tmp_path / "four")


def test_settings_that_are_not_repeated_stay(resume, finished, tmp_path):
    before = load_recipe(finished / "config.yaml")
    code, said, complaint = resume()
    assert code == 0, complaint
    assert "Resumed at iteration 6" in said
    assert load_recipe(tmp_path / "run" / "config.yaml") == before
    assert_same_runs(tmp_path / "run", finished)


def test_the_newest_run_of_recipe_and_model_is_resumed(finished, tmp_path, run_main):
    names = ("test_resnet-study-random", "test_resnet-study-random-3", "test_resnet-study-random-2", "resnet18-study")
    for seconds, name in enumerate(names):
        shutil.copytree(finished, tmp_path / name)
        os.utime(tmp_path / name / "metrics.json", (seconds, seconds))
    model_last = tmp_path / "test_resnet-study-random-2" / "model_last.pth"
    old = contents(tmp_path / "test_resnet-study-random")
    arguments = ["study", "model=test_resnet", "epochs=3", "--resume", "--output", str(tmp_path)]
    assert run_main(train.main, *arguments)[0] == 0
    assert contents(tmp_path / "test_resnet-study-random") == old
    assert torch.load(model_last, weights_only=True)["trainer"]["iteration"] == 9
    code, _, complaint = run_main(train.main, "best", "model=test_resnet", "--resume", "--output", str(tmp_path))
    assert code == 2
    assert "no run to resume" in complaint


def test_the_data_narrows_which_run_is_resumed(finished, kept_root, tmp_path, run_main):
    """One on the sample, which is newer, is not meant where other data is named."""
    for seconds, name in enumerate(("test_resnet-study-random", "test_resnet-study-sample-random")):
        shutil.copytree(finished, tmp_path / name)
        os.utime(tmp_path / name / "metrics.json", (seconds, seconds))
    arguments = ["study", "model=test_resnet", f"data={kept_root}", "--resume", "--output", str(tmp_path)]
    code, said, _ = run_main(train.main, *arguments)
    assert code == 0
    assert f"{tmp_path / 'test_resnet-study-random'}: " in said


def test_a_run_keeps_where_its_data_was(tmp_path, run_main, monkeypatch):
    """Also where none was named: later there may be other data in its place."""
    monkeypatch.chdir(tmp_path)
    draw_birds(Path("datasets"))
    arguments = ["study", "model=test_resnet", "pretrained=0", "image_size=32", "batch_size=8", "epochs=1", "workers=0"]
    assert run_main(train.main, *arguments)[0] == 0
    assert data_of_run(tmp_path / "output" / "test_resnet-study-random" / "model_best.pth") == "datasets"


def test_a_recipe_of_ones_own_names_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw_birds(Path("datasets"))
    draw_birds(Path("mine"))
    recipe = Path("own.yaml")
    recipe.write_text("model: test_resnet\nepochs: 1\ndata: mine\n")
    for asked, root in ((["own.yaml"], "mine"), (["own.yaml", "data=datasets"], "datasets"), (["study"], "datasets")):
        _, resolved, found, is_sample = train.resolve(train.parse_request(asked))
        assert (resolved.data, found, is_sample) == (root, Path(root), False)


def test_a_sample_run_that_began_without_the_hub_goes_on_without_it(finished, kept_root, tmp_path, run_main):
    shutil.copytree(finished, tmp_path / "run")
    data = shutil.copytree(kept_root, tmp_path / "sample")
    words = ["study", "model=test_resnet", "pretrained=true", f"data={data}", "epochs=3", "--resume"]
    words += ["--output", str(tmp_path), "--name", "run"]
    code, _, complaint = run_main(train.main, *words)
    assert code == 2 and "pretrained: False -> True" in complaint
    (data / "sample.json").write_text('{"seed": 0}')
    code, said, complaint = run_main(train.main, *words)
    assert code == 0, complaint
    assert "Resumed at iteration 6" in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("batch_size=4", "batch_size: 8 -> 4"),
        ("accumulate=2", "accumulate: 1 -> 2"),
        ("model=resnet18", "model: test_resnet -> resnet18"),
        ("image_size=40", "image_size: 32 -> 40"),
        ("seed=1", "seed: 0 -> 1"),
        ("rotation=3", "rotation: 15.0 -> 3.0"),
        ("flip=0.1", "flip: 0.5 -> 0.1"),
        ("mixup=0.2", "mixup: 0.0 -> 0.2"),
        ("train_crop=random", "train_crop: center -> random"),
        ("holdout=0.2", "holdout: 0.0 -> 0.2"),
        ("optimizer=sgd", "optimizer: momentum -> sgd"),
        ("ema_decay=0.9", "ema_decay: 0.0 -> 0.9"),
        ("lr=-1", "lr=-1.0: expected more than 0"),
        ("data={other}", "was trained on other images than the 29 here"),
        ("weights=a.pth pretrained=true", "weights: None -> a.pth"),
        ("epochs=1", "2 epochs are done, asked for are 1"),
    ],
)
def test_what_a_resumed_run_cannot_change_leaves_every_file_as_it_was(resume, tiny_root, tmp_path, change, complaint):
    split = tiny_root / "CUB_200_2011" / "train_test_split.txt"
    split.write_text(split.read_text().replace("1 1\n", "1 0\n", 1))  # other data: one photograph changes sides
    before = contents(tmp_path / "run")
    code, _, said = resume("epochs=3", *change.format(other=tiny_root).split())
    assert code == 2
    assert complaint in said
    assert said.count("\n") == 1
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("given", [["epochs=5"], ["epochs=5", "milestones=[1,2]"]], ids=" ".join)
def test_milestones_keep_their_shares_unless_they_are_given(tmp_path, given):
    (tmp_path / "steps.yaml").write_text("schedule: multistep\nepochs: 20\nmilestones: [10, 16]\n")
    milestones = load_recipe(tmp_path / "steps.yaml", given).milestones
    assert milestones == ([1, 2] if len(given) == 2 else [2.5, 4])


def test_the_average_forgets_as_fast_counted_in_images(tmp_path):
    (tmp_path / "average.yaml").write_text("batch_size: 32\nema_decay: 0.99\n")
    small = load_recipe(tmp_path / "average.yaml", ["batch_size=8"])
    assert small.ema_decay**4 == pytest.approx(0.99)  # four steps of 8 images, as one of 32
    assert load_recipe(tmp_path / "average.yaml", ["batch_size=8", "ema_decay=0.5"]).ema_decay == 0.5
    assert load_recipe(tmp_path / "average.yaml", ["batch_size=32", "epochs=3"]).ema_decay == 0.99


def test_a_recipe_of_ones_own_trains_and_names_the_run(kept_root, tmp_path, run_main):
    """Its milestones move with the epochs: after half of them a tenth, after three quarters a hundredth."""
    settings = {"model": "test_resnet", "pretrained": "false", "image_size": 32, "batch_size": 8, "lr": 0.1}
    settings |= {"schedule": "multistep", "epochs": 8, "milestones": "[4, 6]", "flip": 0.0}
    path = tmp_path / "my steps.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    code, _, complaint = run_main(
        train.main, str(path), f"data={kept_root}", "epochs=4", "--output", str(tmp_path / "output")
    )
    assert code == 0, complaint
    (run,) = (tmp_path / "output").iterdir()
    assert run.name == "test_resnet-my steps-random"
    assert rates(run) == pytest.approx([0.1, 0.1, 0.01, 0.001])


CARD = {"mean": [0.5] * 3, "std": [0.25] * 3, "class_names": ["wren", "owl"]}


@pytest.mark.parametrize("milestone", [1, 1.5, 1.1])
def test_the_rate_falls_at_the_milestone_and_not_before(milestone):
    recipe = Recipe(schedule="multistep", milestones=[milestone], epochs=2, lr=1.0, pretrained=False)
    trainer = build_trainer(recipe, build_model("test_resnet", 2), 10, CARD)
    seen = []
    for iteration in range(20):
        trainer.scheduler.step_update(iteration)
        seen.append(trainer.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([1.0 if iteration / 10 < milestone else 0.1 for iteration in range(20)])


def test_what_a_recipe_asks_for_is_what_trains():
    recipe = Recipe(
        **{"lr": 0.8, "backbone_lr_scale": 0.25, "schedule": "cosine", "warmup": 0.25, "epochs": 4},
        **{"flip": 0.1, "rotation": 7, "random_erasing": 0.3, "label_smoothing": 0.05},
        **{"mixup": 0.2, "cutmix": 0.9, "mix_prob": 0.6},
    )
    trainer = build_trainer(recipe, build_model("test_resnet", 2), 10, CARD)
    assert (trainer.augment.flip, trainer.augment.rotation, trainer.augment.random_erasing) == (0.1, 7, 0.3)
    white = trainer.augment(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    torch.testing.assert_close(white, torch.full((1, 3, 2, 2), 2.0))  # (1 - 0.5) / 0.25
    mixup = trainer.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.label_smoothing) == (0.2, 0.9, 0.6, 0.05)
    assert trainer.criterion.label_smoothing == 0  # mixup has done it
    # A quarter of 40 iterations warms up: the fifth is half way to 0.8, and to a quarter of that in the backbone.
    trainer.scheduler.step_update(5)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.4, 0.1])


def test_from_random_weights_every_layer_learns_at_the_full_rate():
    recipe = Recipe(pretrained=False, lr=0.8, backbone_lr_scale=0.25, schedule="constant")
    trainer = build_trainer(recipe, build_model("test_resnet", 2), 10, CARD)
    trainer.scheduler.step_update(0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.8, 0.8])


def test_snapmix_has_the_settings_of_the_recipe_and_leaves_smoothing_to_the_loss():
    recipe = Recipe(snapmix=3.0, mix_prob=0.6, label_smoothing=0.05)
    trainer = build_trainer(recipe, build_model("test_resnet", 2), 10, CARD)
    assert (trainer.mixup.alpha, trainer.mixup.prob) == (3.0, 0.6)
    assert trainer.criterion.label_smoothing == 0.05


TRAIN = ["study", "model=test_resnet", "pretrained=false", "image_size=32", "batch_size=8"]
COMMANDS = {
    "train": (train.main, TRAIN),
    "grid": (sweep.main, ["grid", *TRAIN]),
    "pretraining": (sweep.main, ["pretraining", *TRAIN]),
    "evaluate": (evaluate.main, []),
}


@pytest.mark.parametrize(
    ("command", "arguments", "complaint"),
    [
        ("train", "mix_prob=2", "mix_prob=2.0: expected 0 or more and at most 1"),
        ("train", "workers=-1", "workers=-1: expected 0 or more"),
        ("train", "patience=-1", "patience=-1: expected 0 or more"),
        ("train", "drop_rate=7", "drop_rate=7.0: expected 0 or more and less than 1"),
        ("train", "weight_decay=-1", "weight_decay=-1.0: expected 0 or more"),
        ("train", "momentum=-1", "momentum=-1.0: expected 0 or more and less than 1"),
        ("train", "backbone_lr_scale=-1", "backbone_lr_scale=-1.0: expected 0 or more"),
        ("train", "lr=nan", "lr=nan: expected more than 0"),
        ("train", "epochs=", "epochs"),
        ("train", "batch_size=31", "at most the 30 training images"),
        ("train", "cutmix=1 batch_size=7", "batch_size=7: expected at most the 30 training images and a multiple of 2"),
        ("train", "accumulate=3", "batch_size=8: expected at most the 30 training images and a multiple of 3"),
        ("train", "model=resnet18.bogus", "timm has no weights 'bogus' of resnet18"),
        ("train", "model=resnet81", "did you mean"),
        ("train", "optimizer=adamx", "did you mean adamax"),
        ("train", "optimizer=fusedsgd", "no such optimizer here"),
        ("train", "model=vit_tiny_patch16_224 image_size=448", "takes images of 224 pixels only"),
        ("train", "model=alexnet", "image_size=32: alexnet takes none of this size"),
        (
            "train",
            "model=halonet26t image_size=224",
            "takes none of this size (AssertionError); expected another, such as 256",
        ),
        ("train", "weights=none.pth pretrained=true", "none.pth: no such weights file"),
        ("train", "--resume", "no run to resume"),
        ("train", "best", "study best: expected one recipe"),
        ("grid", "--lrs ' '", "' ': expected one or more numbers"),
        ("grid", "--epochs ' '", "' ': expected one or more numbers"),
        ("grid", "--lrs '0.1 fast'", "'0.1 fast': expected one or more numbers"),
        ("pretraining", "mix_prob=2", "mix_prob=2.0"),
        ("evaluate", "", "no trained classifier in it; expected WEIGHTS=path"),
        ("evaluate", "none.pth", "none.pth: no such weights file"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_no_folder(
    kept_root, tmp_path, monkeypatch, run_main, command, arguments, complaint
):
    monkeypatch.chdir(tmp_path)
    main, first = COMMANDS[command]
    data = [] if command == "evaluate" else [f"data={kept_root}"]
    code, _, said = run_main(main, *first, *shlex.split(arguments), *data)
    assert code == 2
    assert complaint in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mixup_needs_pairs_in_every_process(kept_root, tmp_path, monkeypatch, run_main):
    monkeypatch.setenv("WORLD_SIZE", "4")  # as the launcher says it
    changes = ["batch_size=20", "mixup=0.2", f"data={kept_root}", "--output", str(tmp_path / "output")]
    code, _, said = run_main(train.main, *TRAIN, *changes)
    assert code == 2
    assert "batch_size=20: expected at most the 30 training images and a multiple of 8 (4 processes" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "output").exists()
