from dataclasses import replace
from pathlib import Path

import pytest

from classification.recipe import Recipe, differences, load_recipe, save_recipe
from common.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "classification" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_opens_with_what_it_is(path):
    assert load_recipe(path).model.startswith(("resnet18", "alexnet"))
    header = path.read_text().split("\nmodel:")[0]
    assert "# Run:" in header
    assert "# Reaches:" in header or "# To beat:" in header


def test_the_study_to_the_letter():
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "study"))
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("momentum", 0.9, 1e-3)
    assert (recipe.lr, recipe.backbone_lr_scale, recipe.epochs) == (0.02, 0.1, 20)
    assert recipe.flip
    assert recipe.rotation
    assert not (recipe.mixup or recipe.cutmix or recipe.label_smoothing or recipe.ema_decay or recipe.random_erasing)


def test_overrides_win_and_survive_being_saved(tmp_path):
    recipe = load_recipe(
        RECIPES[0],
        ["lr=1e-3", "epochs=5", "pretrained=0", "lr=0.5", "schedule=multistep", "milestones=[3,4]", "weights=null"],
    )
    assert (recipe.lr, recipe.epochs, recipe.pretrained, recipe.milestones) == (0.5, 5, False, [3, 4])
    save_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe
    assert differences(recipe, replace(recipe, workers=9)) == []
    assert differences(recipe, replace(recipe, seed=4)) == ["seed: 0 -> 4"]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("learning_rate=1", "learning_rate"),
        ("lr=fast", "lr: Value 'fast'"),
        ("lr=0", "lr=0.0: expected more than 0"),
        ("lr", "expected KEY=VALUE"),
        ("schedule=linear", "expected one of constant, cosine, multistep"),
        ("holdout=1.5", "holdout=1.5"),
        ("epochs=0", "epochs=0: expected 1 or more"),
        ("crop_pct=0", "crop_pct=0.0"),
        ("choose=median", "expected one of best, last"),
        ("snapmix=-1", "snapmix=-1.0: expected 0 or more"),
        ("seed=18446744073709551616", "seed=18446744073709551616: expected 0 or more and less than"),
        ("crop_scale=0.5 train_crop=center", "crop_scale=0.5: nothing would come of it without train_crop=random_r"),
        ("mix_prob=0.5", "mix_prob=0.5: nothing would come of it without mixup, cutmix or snapmix"),
        ("milestones=[3]", "milestones=[3]: nothing would come of it without schedule=multistep"),
        ("schedule=multistep", "milestones=[]: expected epochs at which the rate falls, in order"),
        ("schedule=multistep milestones=[8,4]", "milestones=[8.0, 4.0]: expected epochs"),
        ("schedule=multistep milestones=[nan]", "milestones=[nan]: expected epochs"),
        ("optimizer=adamw momentum=0.5", "momentum=0.5: nothing would come of it without an optimizer that has it"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(override, complaint):
    with pytest.raises(UserError) as caught:
        load_recipe(RECIPES[0], override.split())
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["2024_05", "birds #2", "12:30", "yes", "1e3", "[a]", "a: b", "null "])
def test_names_stay_what_they_are(name, tmp_path):
    recipe = load_recipe(RECIPES[0], [f"data={name}", f"weights={name}"])
    assert (recipe.data, recipe.weights) == (name, name)
    save_recipe(recipe, tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml") == recipe


def test_weights_that_are_given_are_taken_whatever_the_recipe_starts_from():
    sample = RECIPES[0].with_name("sample.yaml")
    assert not load_recipe(sample).pretrained
    assert load_recipe(sample, ["weights=a.pth"]).pretrained
    assert not load_recipe(sample, ["weights=null"]).pretrained


def test_contradictions_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="not both"):
        load_recipe(RECIPES[0], ["weights=a.pth", "pretrained=0"])
    study = RECIPES[0].with_name("study.yaml")
    with pytest.raises(UserError, match="stopping early is choosing"):
        load_recipe(study, ["choose=last", "patience=3"])
    with pytest.raises(UserError, match="expected one way to mix"):
        load_recipe(study, ["snapmix=5", "cutmix=1"])
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("lr: [1\n")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_recipe(tmp_path / "bad.yaml")
    assert Recipe().model == "resnet18"
