"""The report, from small folders that the project's own programs wrote; whole, halved, broken, and of other data."""

import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

from classification import evaluate as evaluate_birds
from classification.cub import read_cub
from classification.model import build_model
from classification.recipe import Recipe, save_recipe
from classification.run import Run
from classification.sweep import compare_pretraining, sweep_grid
from common.data_root import data_facts
from common.run_folder import append_metrics, read_metrics, record_session
from detection import train_net
from detection.evaluation import evaluate_voc
from detection.matching import Detections
from tests.tools.scenes import TINY, TINY_FRCNN, TINY_YOLOV3, draw_voc
from tools import compare_detectors, visualize_proposals
from tools.report.__main__ import main
from tools.report.birds import sweep
from tools.report.document import BROWSERS, NONE, figure
from tools.report.runs import Runs
from tools.report.study import CLASSES, FINDINGS, STUDY


def draw_birds(root: Path) -> None:
    """Three species in CUB's layout, four training and two test pictures each."""
    lines: dict[str, list[str]] = {name: [] for name in ("classes", "images", "image_class_labels", "train_test_split")}
    for label in (1, 2, 3):
        name = f"{label:03d}.Bird_{label}"
        lines["classes"].append(f"{label} {name}")
        (root / "CUB_200_2011" / "images" / name).mkdir(parents=True)
        for number in range(6):
            index = len(lines["images"]) + 1
            noise = np.random.default_rng(index).integers(0, 60, (40, 48, 3)) + 50 * label
            Image.fromarray(noise.astype(np.uint8)).save(root / "CUB_200_2011/images" / name / f"{number}.jpg")
            lines["images"].append(f"{index} {name}/{number}.jpg")
            lines["image_class_labels"].append(f"{index} {label}")
            lines["train_test_split"].append(f"{index} {int(number < 4)}")
    for name, rows in lines.items():
        (root / "CUB_200_2011" / f"{name}.txt").write_text("\n".join(rows) + "\n")


def train_bird(run: Path, root: Path, **settings: object) -> None:
    recipe = Recipe(model="test_resnet", image_size=32, batch_size=4, data=str(root), **{"epochs": 2, **settings})
    run.mkdir(parents=True)
    save_recipe(recipe, run / "config.yaml")
    cub = read_cub(root)
    weights = Path(recipe.weights) if recipe.weights else None
    torch.manual_seed(0)
    model = build_model(recipe.model, 3, recipe.pretrained, weights)
    with record_session(run, **data_facts(root)):
        Run(recipe, cub, model, torch.device("cpu")).train(run)


def call(program, *arguments: object) -> None:
    """Calls a `main` that reads the command line of the process."""
    before, sys.argv = sys.argv, ["program", *map(str, arguments)]
    try:
        program()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of everything, by the programs themselves."""
    root, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("tiny data")
    draw_voc(data / "voc")
    draw_birds(data)

    train_bird(root / "other", data, pretrained=False)
    weights = root / "other" / "model_best.pth"
    train_bird(root / "finetuned", data, weights=str(weights), epochs=3)
    shared = Recipe(model="test_resnet", image_size=32, batch_size=4, data=str(data))
    for name, settings in (
        ("pair-pretraining/pretrained", {"weights": str(weights)}),
        ("pair-pretraining/random", {"pretrained": False}),
        ("few-grid/lr0.05-epochs1", {"lr": 0.05, "epochs": 1, "pretrained": False}),
        ("few-grid/lr0.05-epochs2", {"lr": 0.05, "epochs": 2, "pretrained": False}),
    ):
        train_bird(root / name, data, **settings)
    for name in ("pair-pretraining", "few-grid"):
        save_recipe(shared, root / name / "config.yaml")
    compare_pretraining([], 2, root / "pair-pretraining")  # both are trained: it takes them as they are
    sweep_grid([0.05], [1, 2], [], root / "few-grid")
    call(evaluate_birds.main, root / "finetuned" / "model_best.pth", "--data", data)

    for name, options in (("faster_rcnn", TINY_FRCNN), ("yolov3", TINY_YOLOV3)):
        words = [str(word) for pair in {**TINY, **options}.items() for word in pair]
        arguments = ["--model", name, "--data", str(data / "voc"), "--output", str(root)]
        call(train_net.main, *arguments, *words)
        call(train_net.main, *arguments, "--eval-only")
    call(visualize_proposals.main, "--output", root)
    photographs = sorted(str(path) for path in (data / "voc/JPEGImages").iterdir())[:3]
    compare = ["--output", str(root), "--score", "0.01", "--out"]
    compare_detectors.main([*compare, str(root / "comparison"), *photographs])
    compare_detectors.main([*compare, str(root / "errors")])
    return root


class Page(HTMLParser):
    """Reads the tables and the text of a page, and checks that every element is closed and in its place."""

    VOID = ("meta", "link", "img", "wbr", "br", "hr", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data

    def table(self, *columns: str) -> list[list[str]]:
        """The rows of the only table that begins with these columns."""
        (found,) = [table[1:] for table in self.tables if tuple(table[0][: len(columns)]) == columns]
        return found


def make(runs: Path, out: Path) -> Page:
    main(["--runs", str(runs), "--out", str(out)])
    return Page(out / "index.html")


@pytest.fixture(scope="module")
def whole(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    out = tmp_path_factory.mktemp("report")
    return out, make(runs, out)


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The runs, to be spoilt."""
    return shutil.copytree(runs, tmp_path / "runs", copy_function=shutil.copy2)


def test_all_parts_are_there(whole: tuple[Path, Page]) -> None:
    out, page = whole
    assert "not there" not in page.text.lower()
    assert "Left out" not in page.text
    sections = [
        "results",
        "study",
        "runs",
        "sweep",
        "pretraining",
        "classifier",
        "detectors",
        "curves",
        "precision-recall",
    ]
    assert page.ids == [*sections, "proposals", "photographs", "errors", "speed"]
    assert [address for address in page.addresses if address.startswith("#")] == [f"#{id}" for id in page.ids]
    names = {path.stem for path in (out / "figures").iterdir()}
    assert names >= {"sweep", "pretraining", "classifier", "curves-faster-r-cnn", "curves-yolov3", "errors"}
    assert names >= {
        "pr-curves-faster-r-cnn",
        "pr-curves-yolov3",
        "classes-yolov3",
        "confused_pairs",
        "confusion_matrix",
    }
    assert names >= {f"proposals-{number}" for number in (1, 2, 3, 4)} | {f"photograph-{n}" for n in (1, 2, 3)}


def test_numbers_by_class_are_those_of_the_evaluation(runs: Path, whole: tuple[Path, Page]) -> None:
    tables = [table for table in whole[1].tables if table[0][-2:] == ["ap, 11 points", "ap, area"]]
    assert len(tables) == 2
    results = {(row[0], row[3]): row[4] for row in whole[1].table("what", "data", "started from")}
    for table, folder, name in zip(
        tables, ("faster_rcnn_R_50_FPN", "yolov3_darknet53"), ("Faster R-CNN", "YOLOv3"), strict=True
    ):
        evaluation = json.loads((runs / folder / "evaluation" / "evaluation.json").read_text())
        for row, (label, figures) in zip(table[1:], evaluation["per_class"].items(), strict=False):
            assert row[:3] == [label, str(figures["gts"]), str(figures["dets"])]
            values = [figures["recall"], figures["AP50_11point"], figures["AP50"]]
            assert [float(cell) for cell in row[3:]] == pytest.approx(values, abs=5.01e-4)
        means = [evaluation["AP50_11point"], evaluation["AP50"]]
        assert table[-1][0] == "mAP"
        assert [float(cell) for cell in table[-1][4:]] == pytest.approx(means, abs=5.01e-4)
        shown = [float(results[name, metric]) for metric in ("mAP, 11 points", "mAP, area")]
        assert shown == pytest.approx(means, abs=5.01e-4)


def test_numbers_of_the_sweep_and_of_the_birds_are_those_of_the_files(runs: Path, whole: tuple[Path, Page]) -> None:
    page = whole[1]
    expected = pd.read_csv(runs / "few-grid" / "sweep.csv")
    shown = np.array(page.table("learning rate", "epochs", "validation top-1, %"), dtype=float)
    np.testing.assert_allclose(shown, expected.to_numpy(), atol=0.0051)
    best = expected.iloc[0]
    assert f"Best: rate {best['lr']:g} with {best['epochs']:.0f} epochs" in page.text

    expected = pd.read_csv(runs / "pair-pretraining" / "comparison.csv").set_index("start")
    for row in page.table("start", "weights", "epochs"):
        figures = [float(cell) for cell in row[5:7]]
        assert figures == pytest.approx(expected.loc[row[0], ["test top-1", "test top-5"]].tolist(), abs=0.0051)
    assert "pretrained means the weights other/model_best.pth, from a run on" in page.text

    report = json.loads((runs / "finetuned" / "evaluation" / "report.json").read_text())
    keys = ("images", "top1", "top5", "mean_class_accuracy", "calibration_error", "loss")
    (row,) = page.table("images", "top-1, %", "top-5, %")
    assert [float(cell) for cell in row] == pytest.approx([report[key] for key in keys], abs=0.0051)
    pairs = pd.read_csv(runs / "finetuned" / "evaluation" / "confused_pairs.csv", dtype=str)
    assert page.table("true class", "taken for", "images") == pairs[["true", "predicted", "images"]].values.tolist()


def test_numbers_of_proposals_photographs_and_errors_are_those_of_the_files(
    runs: Path, whole: tuple[Path, Page]
) -> None:
    page = whole[1]
    recall = pd.read_csv(runs / "faster_rcnn_R_50_FPN" / "proposals" / "recall.csv")
    (row,) = page.table("proposals kept", *map(str, recall["proposals"]))
    assert [float(cell) for cell in row[1:]] == pytest.approx(recall["recall"].tolist(), abs=5.01e-4)

    photographs = pd.read_csv(runs / "comparison" / "photographs.csv").iloc[:-1]
    for row, (_, expected) in zip(page.table("photograph", "both"), photographs.iterrows(), strict=True):
        assert row[0] == Path(expected["photograph"]).name
        columns = ["both", "other class", "only Faster R-CNN", "only YOLOv3", "Faster R-CNN ms", "YOLOv3 ms"]
        assert [float(cell) for cell in row[1:]] == pytest.approx(expected[columns].tolist(), abs=0.51)

    errors = pd.read_csv(runs / "errors" / "errors.csv")
    rows = page.table("error", "Faster R-CNN, number")
    assert [row[0] for row in rows] == errors["error"].tolist()
    np.testing.assert_allclose(
        np.array([row[1:] for row in rows], dtype=float), errors.iloc[:, 1:].to_numpy(float), atol=6e-4
    )


def test_what_ran_is_told_from_the_files(runs: Path, whole: tuple[Path, Page]) -> None:
    rows = {row[0]: row for row in whole[1].table("run", "network")}
    assert set(rows) == {"finetuned", "other", "faster_rcnn_R_50_FPN", "yolov3_darknet53"} | {
        "few-grid (2 runs)",
        "pair-pretraining (2 runs)",
    }
    assert all(row[-1] == "finished" for row in rows.values())
    assert rows["yolov3_darknet53"][5:7] == ["0", "2 iterations"]
    sessions = json.loads((runs / "finetuned" / "environment.json").read_text())
    for fact in (sessions[0]["machine"], *sessions[0]["versions"].values()):
        assert fact in whole[1].text
    assert sessions[0]["command"] not in ("", None)


def test_the_page_needs_nothing_else(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    text = (whole[0] / "index.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    assert "<script" not in text
    for query in ("prefers-color-scheme: dark", "@media print", "width=device-width"):
        assert query in text


def test_pictures_of_the_markdown_exist_and_can_be_opened(whole: tuple[Path, Page]) -> None:
    out, page = whole
    text = (out / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == len([address for address in page.addresses if address.startswith("data:image/")])
    for name in pictures:
        if name.endswith(".webp"):
            with Image.open(out / name) as image:
                image.load()
        else:
            assert (out / name).read_text().rstrip().endswith("</svg>")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == len(page.tables)
    for table in tables:
        rows = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
        assert re.fullmatch(r"\|(:?-+:?\|)+", rows[1])


def test_made_twice_it_is_the_same_but_for_the_date(runs: Path, whole: tuple[Path, Page], tmp_path: Path) -> None:
    make(runs, tmp_path)

    def content(folder: Path) -> dict[str, bytes]:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name in ("index.html", "report.md"):
            files[name], count = re.subn(rb"Made on \d{4}-\d\d-\d\d \d\d:\d\d", b"", files[name])
            assert count == 1
        return files

    assert content(tmp_path) == content(whole[0])


@pytest.mark.parametrize(
    ("half", "there", "missing"),
    [
        (
            ["other", "finetuned", "pair-pretraining", "few-grid"],
            "classifier",
            ["make train-frcnn", "make train-yolov3", "make visualize-proposals"],
        ),
        (
            ["faster_rcnn_R_50_FPN", "yolov3_darknet53", "comparison", "errors"],
            "detectors",
            ["make sweep", "make compare-pretraining", "make finetune", "make eval-classifier"],
        ),
    ],
)
def test_half_is_told_and_the_rest_named_with_its_command(
    copy: Path, tmp_path: Path, half: list[str], there: str, missing: list[str]
) -> None:
    for folder in copy.iterdir():
        if folder.name not in half:
            shutil.rmtree(folder)
    page = make(copy, tmp_path / "report")
    assert there in page.ids
    assert page.ids[-1] == "missing"
    for command in missing:
        assert command in page.text
        assert command in (tmp_path / "report" / "report.md").read_text()


def test_broken_files_are_named_and_the_rest_is_told(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (copy / "finetuned" / "metrics.json").read_text().splitlines()
    (copy / "finetuned" / "metrics.json").write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    broken = {
        "yolov3_darknet53/config.yaml": b"MODEL: [unclosed",
        "faster_rcnn_R_50_FPN/evaluation/evaluation.json": b'{"AP50": 1}',
        "faster_rcnn_R_50_FPN/proposals/recall.csv": b"\xff\xfe\x00",
        "comparison/comparison.json": b"[1, 2]",
        "errors/errors.json": b"null",
        "few-grid/sweep.png": b"no picture",
        "pair-pretraining/random/result.json": b'{"top1": "high"}',
        "finetuned/environment.json": b"7",
    }
    for name, content in broken.items():
        (copy / name).write_bytes(content)
    (copy / "empty").mkdir()
    closed = copy / "lost+found"
    closed.mkdir(mode=0)  # which the superuser may read, and may be who runs the tests
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    page = make(copy, tmp_path / "report")
    for name in (*broken, "finetuned/metrics.json"):
        name = name.replace("recall.csv", "proposals.json")  # they are read together
        assert f"{copy / name}: " in page.text, name
    assert f"{copy / 'empty'}: an empty folder" in page.text
    assert f"{closed}: may not be read; left out" in page.text
    assert "line 2 is '{broken'" in page.text
    assert page.table("learning rate", "epochs")
    assert [table[0][-1] for table in page.tables].count("ap, area") == 1  # the run's own evaluation stands in


def test_an_older_file_stands_in_for_a_broken_one_and_a_sweep_tells_how_far_it_is(copy: Path, tmp_path: Path) -> None:
    shutil.copytree(copy / "errors", copy / "errors-2")
    (copy / "errors-2" / "errors.json").write_text("null")
    (copy / "few-grid" / "lr0.05-epochs2" / "result.json").unlink()
    (copy / "pair-pretraining" / "random" / "config.yaml").write_text("7")
    page = make(copy, tmp_path / "report")
    assert "errors-2/errors.json: not what was expected" in page.text
    assert len(page.table("error", "Faster R-CNN, number")) == 6
    assert len(page.table("learning rate", "epochs")) == 1
    assert "1 of 2 runs have not finished" in page.text
    states = {row[0]: row[-1] for row in page.table("run", "network")}
    assert states["few-grid (2 runs)"] == "1 of 2 runs finished"
    assert "pair-pretraining (1 runs)" in states
    assert "pair-pretraining" not in states


def test_a_sweep_still_going_comes_after_one_that_has_ended(copy: Path, tmp_path: Path) -> None:
    newer = copy / "few-grid-2"
    shutil.copytree(copy / "few-grid", newer)
    (newer / "lr0.05-epochs2" / "result.json").unlink()  # this trial has failed
    for metrics in newer.glob("*/metrics.json"):
        os.utime(metrics, (2e9, 2e9))
    assert "Every run of few-grid-2, the best first" in make(copy, tmp_path / "report").text
    (newer / "sweep.csv").unlink()
    assert "Every run of few-grid, the best first" in make(copy, tmp_path / "report").text


def test_a_run_still_going_says_so(copy: Path, tmp_path: Path) -> None:
    """As it is after an epoch: no result, a row of metrics half written, neither seconds nor an end known yet."""
    for name in ("yolov3_darknet53", "finetuned"):
        run = copy / name
        (run / "result.json").unlink(missing_ok=True)
        sessions = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps([{**sessions[0], "seconds": None, "finished": False}]))
        first = read_metrics(run)[0]
        (run / "metrics.json").write_text("")
        append_metrics(run, first)
        with (run / "metrics.json").open("a") as file:
            file.write('{"iteration": 1, "tot')
    page = make(copy, tmp_path / "report")
    rows = {row[0]: row for row in page.table("run", "network")}
    assert rows["yolov3_darknet53"][6:] == ["1 of 2 iterations", "–", "not finished: still going, or interrupted"]  # noqa: RUF001
    assert rows["finetuned"][6] == "1 of 3 epochs"
    assert "So far: the run has not finished." in page.text


def test_a_run_just_begun_and_one_without_settings(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "begun"
    run.mkdir(parents=True)
    save_recipe(Recipe(), run / "config.yaml")
    append_metrics(tmp_path / "runs", {"iteration": 0})
    page = make(tmp_path / "runs", tmp_path / "report")
    (row,) = page.table("run", "network")
    assert (row[0], row[6]) == ("begun", "0 of 20 epochs")
    assert "it cannot be told what ran" in page.text


def test_nothing_at_all_is_a_report_and_no_folder_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    page = make(tmp_path / "runs", tmp_path / "report")
    assert page.ids == ["missing"]
    with pytest.raises(SystemExit) as exit_code:
        main(["--runs", str(tmp_path / "nowhere"), "--out", str(tmp_path / "report")])
    assert exit_code.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'nowhere'}: no such folder")


def section(page: Path, id: str) -> str:
    """The text of one section of a page."""
    (found,) = re.findall(rf'<h2 id="{id}">(.*?)</section>', page.read_text(), re.DOTALL)
    return " ".join(re.sub("<[^>]+>", " ", found.replace("<wbr>", "")).split())


def test_on_other_data_the_figures_of_the_study_stand_alone(runs: Path, whole: tuple[Path, Page]) -> None:
    page = whole[0] / "index.html"
    assert "None of this was measured on the data of the study" in section(page, "results")
    assert "its figures below stand alone" in section(page, "study")
    everything = re.sub(r"data:image/[^\"]+", "", page.read_text())
    elsewhere = everything.replace(re.findall(r'<h2 id="study">.*?</section>', everything, re.DOTALL)[0], "")
    assert not re.search(r"0\.754|73\.70", elsewhere)

    rows = whole[1].table("class", "gts", "dets", "recall", "ap")
    assert rows[-1] == ["mAP", "", "", "", "0.754"]
    assert ["person", "4,528", "12,702", "0.878", "0.776"] in rows
    assert [row[1] for row in whole[1].table("learning rate", "the study, %")] == ["71.64", "72.45", "73.70"]

    found = dict(whole[1].table("the study", "here"))
    top1 = pd.read_csv(runs / "pair-pretraining" / "comparison.csv").set_index("start")["test top-1"]
    (claim,) = [text for text in found if text.startswith("Pretraining is markedly better")]
    difference = top1["pretrained"] - top1["random"]
    words = "ahead" if difference > 0 else "behind"
    assert f"pretrained is {abs(difference):.2f} points {words}, after 2 epochs" in found[claim]
    (claim,) = [text for text in found if text.startswith("Of the rates")]
    assert found[claim] == "not tested"  # the grid has one rate
    (claim,) = [text for text in found if "overfitted by epoch 30" in text]
    assert found[claim].startswith("Not tested: the run is shorter.")


def test_what_was_found_beside_each_claim_is_what_the_files_say(copy: Path) -> None:
    """Every figure is put into the files here, other ones than a training would give."""
    # Training accuracy, validation loss: pretrained it rises once and falls twice, from random weights the reverse.
    for start, losses, accuracy in (
        ("pretrained", [1.0, 0.75, 0.875, 0.5], 95.5),
        ("random", [3.0, 3.25, 3.5, 2.5], 30.25),
    ):
        run = copy / "pair-pretraining" / start
        config = run / "config.yaml"
        config.write_text(config.read_text().replace("epochs: 2", "epochs: 4"))
        row = read_metrics(run)[-1]
        (run / "metrics.json").unlink()
        for epoch, loss in enumerate(losses, start=1):
            append_metrics(run, {**row, "iteration": epoch, "epoch": epoch, "validation_loss": loss,
                                 "train_top1": accuracy - 10 * (4 - epoch)})  # fmt: skip
    # Two rates with two lengths: the longer run is lower at the one, equal at the other. Test figures are the reverse.
    for rate, epochs, validation, test in ((0.05, 1, 50, 80), (0.05, 2, 40, 90), (0.01, 1, 60, 10), (0.01, 2, 60, 20)):
        trial = copy / "few-grid" / f"lr{rate}-epochs{epochs}"
        if rate == 0.01:
            shutil.copytree(copy / "few-grid" / f"lr0.05-epochs{epochs}", trial)
        result = json.loads((trial / "result.json").read_text())
        result |= {"lr": rate, "validation_top1": float(validation), "top1": float(test)}
        (trial / "result.json").write_text(json.dumps(result))
    # Both detectors fall from their best; the last epoch of YOLOv3 is that by which the study's has overfitted.
    for name, mean_ap, points in (
        ("faster_rcnn_R_50_FPN", 0.75, [(1, 0.2), (2, 0.6), (3, 0.4)]),
        ("yolov3_darknet53", 0.25, [(10, 0.5), (30, 0.125)]),
    ):
        run = copy / name
        row = read_metrics(run)[-1]
        (run / "metrics.json").unlink()
        for iteration, (epoch, value) in enumerate(points):
            append_metrics(run, {**row, "iteration": iteration, "epoch": epoch, "AP50_11point": value})
        evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
        (run / "evaluation" / "evaluation.json").write_text(json.dumps({**evaluation, "AP50_11point": mean_ap}))
    comparison = json.loads((copy / "comparison" / "comparison.json").read_text())
    pair = next(pair for photograph in comparison["photographs"] for pair in photograph["objects"])
    kinds = (["only Faster R-CNN"] * 4 + ["both"], ["only YOLOv3", "other class"], ["both"])
    for photograph, agreements in zip(comparison["photographs"], kinds, strict=True):
        photograph["objects"] = [{**pair, "agreement": agreement} for agreement in agreements]
    (copy / "comparison" / "comparison.json").write_text(json.dumps(comparison))

    runs = Runs(copy)
    found = {claim: find(runs) for claim, find in FINDINGS}
    for claim, expected in {
        "training accuracy is near 100 %": "After 4 epochs it is 95.50 % pretrained and 30.25 % from random weights.",
        "the validation loss is higher": "At the end it is 0.500 pretrained and 2.500 from random weights; from one "
        "epoch to the next it rose 1 and 2 times.",
        "Of the rates": "The best of 0.01, 0.05 is 0.01: 60.00 % validation top-1 with 1 epochs on",
        "More epochs never lower": "Pairs of runs that differ in their length alone: 2; the longer one is lower in 1.",
        "no longer rises after 7": "mAP is highest after 2 of 3 epochs, 0.600; at the end it is 0.400.",
        "overfitted by epoch 30": "mAP is highest after 10 of 30 epochs, 0.500; at the end it is 0.125.",
        "clearly behind": "mAP (11 points) of YOLOv3 is 0.250, of Faster R-CNN 0.750: YOLOv3 is 0.500 behind on",
        "photographs from outside": "On 3 photographs from outside, at score 0.01 or more, Faster R-CNN alone sees 4 "
        "objects, YOLOv3 alone 1, both 3.",
    }.items():
        (said,) = [said for text, said in found.items() if claim in text]
        assert said.startswith(expected)
    assert "Best: rate 0.01 with 1 epochs, validation top-1 60.00 %, test top-1 10.00 %" in next(sweep(runs))
    # What was tested on another split of the same data is not compared.
    sessions = copy / "yolov3_darknet53" / "evaluation" / "environment.json"
    sessions.write_text(json.dumps([{**json.loads(sessions.read_text())[-1], "test": ["voc12_val"]}]))
    assert dict(FINDINGS)[next(text for text in found if "clearly behind" in text)](Runs(copy)) == ""


@pytest.mark.parametrize(
    ("value", "is_difference", "text"),
    [(-0.001, False, "0.00"), (-0.001, True, "0.00"), (0.006, True, "+0.01"), (-1234.5, True, "-1,234.50")],
)
def test_a_figure_that_is_rounded_to_zero_has_no_sign(value: float, is_difference: bool, text: str) -> None:
    assert figure(value, 2, is_difference) == text


def test_figures_of_the_study_are_those_it_states(shared: Path) -> None:
    text = (shared / "study.md").read_text()
    stated = re.findall(r"(\w+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", text)
    assert len(stated) == 20
    for name, *figures in stated:
        assert CLASSES.loc[name].tolist() == [float(number) for number in figures]
    assert f"mAP {STUDY['mAP']:.3f}" in text
    for rate, top1 in STUDY["sweep"].items():
        assert f"{rate} -> {top1:.4f}" in text


def test_on_its_own_data_the_study_stands_beside_ours(copy: Path, tmp_path: Path) -> None:
    """As many objects of each class as VOC07 test has; of dogs half are found, of all others every one."""
    assert (len(CLASSES), CLASSES["gts"].sum()) == (20, 12032)
    names = CLASSES.index.tolist()
    classes = np.repeat(np.arange(20), CLASSES["gts"])
    box = [0.0, 0.0, 10.0, 10.0]
    truth = [{"annotations": [{"bbox": box, "category_id": label}]} for label in classes]
    found = (classes != names.index("dog")) | (np.arange(len(classes)) % 2 == 0)
    number = found.sum()
    detections = Detections(np.flatnonzero(found), classes[found], np.full(number, 0.9), np.tile(box, (number, 1)))
    for name in ("faster_rcnn_R_50_FPN", "yolov3_darknet53"):
        evaluate_voc(truth, detections, names).write(copy / name / "evaluation")
    for run, settings in (
        ("finetuned", {}),
        ("few-grid/lr0.05-epochs1", {"lr": 0.02, "epochs": 20, "top1": 75.0}),
    ):
        recipe = (copy / run / "config.yaml").read_text()
        recipe = recipe.replace("model: test_resnet", "model: resnet18").replace(
            "pretrained: false", "pretrained: true"
        )
        (copy / run / "config.yaml").write_text(recipe)
        result = json.loads((copy / run / "result.json").read_text())
        official = json.dumps({**result, "test_images": 5794, "classes": 200, **settings})
        (copy / run / "result.json").write_text(official)
    shutil.rmtree(copy / "few-grid" / "lr0.05-epochs2")
    page = make(copy, tmp_path / "report")
    study = {(row[0], row[3]): row[5] for row in page.table("what", "data", "started from", "metric", "measured")}
    assert study.pop(("Faster R-CNN", "mAP, 11 points")) == "0.754"
    assert study.pop(("resnet18, fine-tuned", "top-1")) == "73.70 %"
    assert study.pop(("resnet18, best of the sweep", "top-1")) == "73.70 %"
    assert set(study.values()) == {"–"}  # noqa: RUF001

    rows = page.table("class", "gts", "dets", "dets, study", "recall", "recall, study", "ap", "ap, study", "difference")
    assert len(rows) == 21
    # 11 points: half of the recall steps 0, 0.1, ..., 1 are reached, 0.5 itself only if half of 489 is rounded up.
    dogs = sum(step / 10 <= np.mean(found[classes == names.index("dog")]) for step in range(11)) / 11
    (dog,) = [row for row in rows if row[0] == "dog"]
    assert dog[1:] == ["489", str(found[classes == 11].sum()), "1,527", f"{found[classes == 11].mean():.3f}",
                       "0.969", f"{dogs:.3f}", "0.862", f"{dogs - 0.862:+.3f}"]  # fmt: skip
    mean = (19 + dogs) / 20
    assert rows[-1] == ["mAP", "", "", "", "", "", f"{mean:.3f}", "0.754", f"{mean - 0.754:+.3f}"]
    differences = [float(row[-1]) for row in rows[:-1]]
    assert differences == sorted(differences, reverse=True)
    assert rows[0][0] == "pottedplant"  # the study's lowest
    html = (tmp_path / "report" / "index.html").read_text()
    assert len(re.findall(r'class="difference behind"', html)) == 1  # dogs
    assert page.table("learning rate", "the study, %", "here, %", "difference")[-1][1:] == ["73.70", "75.00", "+1.30"]


def second_seed(runs: Path) -> None:
    """Every run again with seed 1, all its figures of accuracy raised, those of precision halved."""
    for folder in [path for path in runs.iterdir() if path.name not in ("other", "comparison", "errors")]:
        again = shutil.copytree(folder, runs / f"{folder.name}-seed1", copy_function=shutil.copy2)
        folder.rename(runs / f"{folder.name}-seed0")
        for path in again.rglob("config.yaml"):
            path.write_text(re.sub(r"^(seed|SEED): 0$", r"\1: 1", path.read_text(), flags=re.MULTILINE))
        for path in [*again.rglob("result.json"), *again.rglob("report.json")]:
            figures = json.loads(path.read_text())
            raised = {key: figures[key] + 5 for key in figures if "top" in key}
            path.write_text(json.dumps({**figures, **raised, "seed": 1}))
        for path in again.rglob("evaluation.json"):
            figures = json.loads(path.read_text())
            halved = {key: figures[key] / 2 for key in ("AP50_11point", "AP50")}
            classes = {
                name: {**row, "dets": row["dets"] + 10, **{key: row[key] / 2 for key in ("recall", *halved)}}
                for name, row in figures["per_class"].items()
            }
            path.write_text(json.dumps({**figures, **halved, "per_class": classes}))
    for path in runs.rglob("environment.json"):
        path.write_text(path.read_text().replace("finetuned/", f"finetuned-{path.parent.parent.name[-5:]}/"))


def test_runs_that_differ_in_their_seed_alone_are_one_row_with_mean_and_deviation(copy: Path, tmp_path: Path) -> None:
    """Of two figures the mean is the middle and the standard deviation (n - 1) their distance over the root of two."""

    def shown(first: float, second: float, digits: int) -> str:
        return f"{np.mean([first, second]):.{digits}f} ± {abs(first - second) / 2**0.5:.{digits}f}"

    second_seed(copy)
    third = shutil.copytree(copy / "finetuned-seed1", copy / "finetuned-longer", copy_function=shutil.copy2)
    config = (third / "config.yaml").read_text()
    shutil.rmtree(third / "evaluation")
    (third / "config.yaml").write_text(config.replace("lr: 0.01", "lr: 0.07"))
    page = make(copy, tmp_path / "report")

    rows = {(row[0], row[3]): row[4] for row in page.table("what", "data", "started from", "metric", "measured")}
    top1 = json.loads((copy / "finetuned-seed0" / "result.json").read_text())["top1"]
    assert rows.pop(("test_resnet, fine-tuned finetuned", "top-1")) == f"{shown(top1, top1 + 5, 2)} % (2 runs)"
    assert rows.pop(("test_resnet, fine-tuned finetuned-longer", "top-1")) == f"{top1 + 5:.2f} %"
    evaluation = json.loads((copy / "faster_rcnn_R_50_FPN-seed0" / "evaluation" / "evaluation.json").read_text())
    ap = evaluation["AP50_11point"]
    assert rows.pop(("Faster R-CNN", "mAP, 11 points")) == f"{shown(ap, ap / 2, 3)} (2 runs)"

    (faster_rcnn, _) = [table for table in page.tables if table[0][-2:] == ["ap, 11 points", "ap, area"]]
    for row, (name, figures) in zip(faster_rcnn[1:], evaluation["per_class"].items(), strict=False):
        assert row[:3] == [name, str(figures["gts"]), str(figures["dets"] + 5)]
        keys = ("recall", "AP50_11point", "AP50")
        assert row[3:] == [shown(figures[key], figures[key] / 2, 3) for key in keys]
    assert faster_rcnn[-1][4] == shown(ap, ap / 2, 3)

    sweep = pd.read_csv(copy / "few-grid-seed0" / "sweep.csv")
    rows = page.table("learning rate", "epochs", "validation top-1, %")
    for row, (_, trial) in zip(rows, sweep.iterrows(), strict=True):
        for cell, key in ((row[2], "validation top-1"), (row[3], "validation top-5"), (row[5], "test top-1")):
            assert cell == shown(trial[key], trial[key] + 5, 2)
    pair = pd.read_csv(copy / "pair-pretraining-seed0" / "comparison.csv").set_index("start")
    for row in page.table("start", "weights", "epochs"):
        assert row[4:6] == ["0, 1", shown(pair["test top-1"][row[0]], pair["test top-1"][row[0]] + 5, 2)]
    report = json.loads((copy / "finetuned-seed0" / "evaluation" / "report.json").read_text())
    (row,) = page.table("images", "top-1, %", "top-5, %")
    assert row[:2] == [str(report["images"]), shown(report["top1"], report["top1"] + 5, 2)]
    # Another kind of evaluation, as with test-time augmentation, is no second figure of the same.
    (copy / "finetuned-seed0" / "evaluation").rename(copy / "finetuned-seed0" / "evaluation_tta")
    (row,) = make(copy, tmp_path / "again").table("images", "top-1, %", "top-5, %")
    assert row[1] in (f"{report['top1']:.2f}", f"{report['top1'] + 5:.2f}")
    assert "2 runs that differ in their seed alone (0, 1)" in section(tmp_path / "report" / "index.html", "detectors")


def test_seeds_are_averaged_where_they_were_measured_alike(copy: Path, tmp_path: Path) -> None:
    second_seed(copy)
    folders = [copy / f"faster_rcnn_R_50_FPN-seed{seed}" / "evaluation" for seed in (0, 1)]
    for folder in folders:  # a class without an object to find
        figures = json.loads((folder / "evaluation.json").read_text())
        figures["per_class"]["blue"] |= {"gts": 0, "recall": None, "AP50_11point": None, "AP50": None}
        (folder / "evaluation.json").write_text(json.dumps(figures))
    sessions = json.loads((folders[0] / "environment.json").read_text())

    def faster_rcnn(page: Page) -> dict[str, list[str]]:
        tables = [table for table in page.tables if table[0][-2:] == ["ap, 11 points", "ap, area"]]
        return {row[0]: row for row in tables[0][1:]}

    blue = faster_rcnn(make(copy, tmp_path / "one"))["blue"]
    assert blue[1] == "0" and blue[3:] == [NONE] * 3
    # The other seed on other data is no second figure of the same.
    (folders[1] / "environment.json").write_text(json.dumps([{**sessions[-1], "data": "elsewhere"}]))
    ap = json.loads((folders[0] / "evaluation.json").read_text())["AP50_11point"]
    assert faster_rcnn(make(copy, tmp_path / "two"))["mAP"][4] == f"{ap:.3f}"


def test_an_evaluation_of_birds_elsewhere_is_told_of_its_run(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all paths are relative."""
    images = json.loads((copy / "finetuned/evaluation/report.json").read_text())["images"]
    (copy / "finetuned/evaluation").rename(copy / "mine")
    monkeypatch.chdir(copy.parent)
    sessions = [{"weights": f"{copy.name}/finetuned/model_best.pth"}]
    (copy / "mine/environment.json").write_text(json.dumps(sessions))
    page = make(Path(copy.name), tmp_path / "report")
    assert [row[0] for row in page.table("images", "top-1, %", "top-5, %")] == [str(images)]


def test_photographs_compared_by_other_detectors_say_nothing_of_the_two(copy: Path, tmp_path: Path) -> None:
    path = copy / "comparison" / "comparison.json"
    make(copy, tmp_path / "one")
    said = "photographs from outside, at score"
    assert said in (tmp_path / "one" / "index.html").read_text()
    path.write_text(path.read_text().replace("Faster R-CNN", "YOLOv3 1").replace('YOLOv3"', 'YOLOv3 2"'))
    make(copy, tmp_path / "two")
    assert said not in (tmp_path / "two" / "index.html").read_text()


def test_runs_of_one_network_that_differ_in_more_stand_side_by_side_by_class(copy: Path, tmp_path: Path) -> None:
    other = shutil.copytree(copy / "yolov3_darknet53", copy / "wide", copy_function=shutil.copy2)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("MAX_ITER: 2", "MAX_ITER: 3"))
    path = other / "evaluation" / "evaluation.json"
    figures = json.loads(path.read_text())
    figures["per_class"]["blue"]["AP50_11point"] = 0.625
    path.write_text(json.dumps(figures))
    rows = make(copy, tmp_path / "report").table("class", "wide", "yolov3_darknet53")
    (blue,) = [row for row in rows if row[0] == "blue"]
    assert blue[1] == "0.625"


def test_the_evaluation_shown_is_that_of_the_run_shown(copy: Path, tmp_path: Path) -> None:
    """A newer evaluation of another run, here of the random one, is not told of the fine-tuned one."""
    random = copy / "pair-pretraining" / "random"
    shutil.copytree(copy / "finetuned" / "evaluation", random / "evaluation")
    sessions = [{"weights": str(random / "model_best.pth")}]
    (random / "evaluation" / "environment.json").write_text(json.dumps(sessions))
    report = json.loads((random / "evaluation" / "report.json").read_text())
    (random / "evaluation" / "report.json").write_text(json.dumps({**report, "images": 7}))
    page = make(copy, tmp_path / "one")
    assert [row[0] for row in page.table("images", "top-1, %", "top-5, %")] == [str(report["images"])]
    assert "finetuned: test_resnet" in section(tmp_path / "one" / "index.html", "classifier")

    for folder in ("finetuned", "other"):
        shutil.rmtree(copy / folder)
    page = make(copy, tmp_path / "two")
    assert [row[0] for row in page.table("images", "top-1, %", "top-5, %")] == ["7"]
    assert "pair-pretraining/random: test_resnet" in section(tmp_path / "two" / "index.html", "classifier")


def test_on_paper_where_a_browser_is_installed(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--runs", str(copy), "--out", str(tmp_path / "report"), "--pdf"]
    pdf = tmp_path / "report" / "report.pdf"
    if any(map(shutil.which, BROWSERS)):
        main(arguments)
        assert pdf.read_bytes().startswith(b"%PDF-")
        assert f"On paper: {pdf}" in capsys.readouterr().out
        pdf.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    main(arguments)
    assert not pdf.exists()
    assert f"not printed: {pdf}: no browser to print it" in capsys.readouterr().out


@pytest.mark.parametrize(("width", "colours"), [(360, "dark"), (1280, "light")])
def test_in_a_browser_it_fits_and_its_contents_lead_there(
    whole: tuple[Path, Page], page, width: int, colours: str
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=colours, reduced_motion="reduce")
    page.goto((whole[0] / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    links = page.locator("nav a")
    assert links.count() > 5
    for number in range(links.count()):
        link = links.nth(number)
        link.click()
        heading = page.locator(link.get_attribute("href"))
        assert heading.inner_text() == link.inner_text()
        expect(heading).to_be_in_viewport()
    background, text = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (background, text)]
    assert (brightness[0] < brightness[1]) == (colours == "dark")
