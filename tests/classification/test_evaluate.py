import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from classification import evaluate
from classification.cub import read_cub
from classification.evaluate import WithMirror, calibration, confused_pairs, confusion_matrix, measure, write_report
from classification.model import build_model, describe
from classification.predict import BirdClassifier
from common.images import read_image
from tools import predict_bird

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(300, 7, generator=GENERATOR)
LABELS = torch.randint(0, 7, (300,), generator=GENERATOR)


def test_figures_are_those_of_a_slow_plain_count():
    report = measure(LOGITS, LABELS)
    probabilities = [[float(v) for v in np.exp(row) / np.exp(row).sum()] for row in LOGITS.double().numpy()]
    ranked = [sorted(range(7), key=lambda c, row=row: -row[c]) for row in probabilities]
    labels = LABELS.tolist()
    assert report.top1 == pytest.approx(100 * np.mean([r[0] == y for r, y in zip(ranked, labels, strict=True)]))
    assert report.top5 == pytest.approx(100 * np.mean([y in r[:5] for r, y in zip(ranked, labels, strict=True)]))
    of_class = [np.mean([r[0] == c for r, y in zip(ranked, labels, strict=True) if y == c]) for c in range(7)]
    assert report.mean_class_accuracy == pytest.approx(100 * np.mean(of_class))
    error = 0.0
    for number in range(15):
        inside = [i for i, row in enumerate(probabilities) if number / 15 < max(row) <= (number + 1) / 15]
        if inside:
            accuracy = np.mean([ranked[i][0] == labels[i] for i in inside])
            error += len(inside) / 300 * abs(accuracy - np.mean([max(probabilities[i]) for i in inside]))
    assert report.calibration_error == pytest.approx(100 * error)
    assert sum(row["weight"] for row in calibration(LOGITS, LABELS)) == pytest.approx(1)


def test_the_matrix_counts_true_by_predicted():
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 2]), 3)
    assert matrix.tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


def test_confused_pairs_are_the_largest_off_diagonal_counts_with_the_surest_example():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = torch.zeros(6, 3)
    for row, (predicted, surety) in enumerate([(1, 1.0), (1, 5.0), (0, 9.0), (1, 9.0), (0, 2.0), (2, 1.0)]):
        logits[row, predicted] = surety
    assert confused_pairs(logits, labels) == [
        {"true": 0, "predicted": 1, "images": 2, "example": 1},
        {"true": 2, "predicted": 0, "images": 1, "example": 4},
    ]
    assert confused_pairs(torch.eye(3), torch.arange(3)) == []


@pytest.fixture
def checkpoint(tiny_root, tmp_path) -> Path:
    torch.manual_seed(0)
    model = build_model("test_resnet", 5)
    card = describe("test_resnet", model, read_cub(tiny_root).class_names, 32, 0.8)
    torch.save({**card, "model": model.state_dict()}, tmp_path / "model_best.pth")
    return tmp_path / "model_best.pth"


def test_a_report_without_a_single_error_can_be_drawn(tiny_root, tmp_path):
    cub = read_cub(tiny_root)
    labels = torch.tensor([bird.label for bird in cub.test])
    report = write_report(tmp_path / "report", 9 * torch.eye(5)[labels], labels, cub.test, cub.class_names)
    assert report.top1 == 100


def test_the_report_of_the_command_line(tiny_root, checkpoint, run_main):
    code, said, _ = run_main(evaluate.main, str(checkpoint), "--data", str(tiny_root))
    assert code == 0
    folder = checkpoint.parent / "evaluation"
    report = json.loads((folder / "report.json").read_text())
    assert report["images"] == 10
    assert f"top-1 {report['top1']:.2f} %" in said
    predictions = pd.read_csv(folder / "predictions.csv")
    assert 100 * (predictions["class"] == predictions["predicted"]).mean() == pytest.approx(report["top1"])
    assert pd.read_csv(folder / "confusion_matrix.csv", index_col=0).to_numpy().sum() == 10
    assert pd.read_csv(folder / "per_class.csv")["accuracy"].mean() == pytest.approx(report["mean_class_accuracy"])
    for name in ("confusion_matrix", "confused_pairs", "calibration", "per_class"):
        assert Image.open(folder / f"{name}.png").size[0] > 300


def test_with_the_mirror_image_the_report_is_of_the_mean_of_both_views(tiny_root, checkpoint, run_main):
    birds = read_cub(tiny_root).test
    for bird in birds:
        pixels = np.array(Image.open(bird.path))
        pixels[:, :24] //= 4  # darker on the left, so that its mirror image is another
        Image.fromarray(pixels).save(bird.path)
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["fc.weight"] *= 100  # and the network surer than one that has learned nothing
    torch.save(state, checkpoint)
    code, _, complaint = run_main(evaluate.main, str(checkpoint), "--data", str(tiny_root), "--tta")
    assert code == 0, complaint
    predictions = pd.read_csv(checkpoint.parent / "evaluation_tta" / "predictions.csv")
    classifier = BirdClassifier(checkpoint)
    differences = []
    for bird, row in zip(birds, predictions.itertuples(), strict=True):
        view = classifier.cut_out(read_image(bird.path))
        plain, mirrored = classifier.probabilities(torch.stack([view, view.flip(2)])).tolist()
        mean = [(one + other) / 2 for one, other in zip(plain, mirrored, strict=True)]
        assert row.predicted == classifier.class_names[mean.index(max(mean))]
        assert row.probability == pytest.approx(max(mean), abs=1e-3)
        differences.append(abs(max(mean) - max(plain)))
    assert max(differences) > 0.02


def test_a_head_of_other_classes_is_refused(tiny_root, checkpoint, run_main):
    state = torch.load(checkpoint, weights_only=True)
    model = build_model("test_resnet", 4)
    torch.save({**state, "class_names": state["class_names"][:4], "model": model.state_dict()}, checkpoint)
    code, _, complaint = run_main(evaluate.main, str(checkpoint), "--data", str(tiny_root))
    assert code == 2
    assert "knows 4 classes" in complaint
    assert complaint.count("\n") == 1


def test_photographs_that_cannot_be_read_are_named_before_anything_is_measured(tiny_root, checkpoint, run_main):
    first, *_, last = (bird.path for bird in read_cub(tiny_root).test)
    for path in (first, last):
        path.write_text("no picture")
    code, _, complaint = run_main(evaluate.main, str(checkpoint), "--data", str(tiny_root))
    assert code == 2
    assert f"{first}: cannot be read as an image" in complaint
    assert f"1 more cannot be taken: {last}" in complaint
    assert not (checkpoint.parent / "evaluation").exists()


def test_a_class_without_test_images_has_no_accuracy(tiny_root, checkpoint, tmp_path, run_main):
    index = tiny_root / "CUB_200_2011" / "train_test_split.txt"
    lines = [line.split() for line in index.read_text().splitlines()]
    index.write_text("".join(f"{number} {1 if int(number) <= 8 else part}\n" for number, part in lines))
    code, _, complaint = run_main(
        evaluate.main, str(checkpoint), "--data", str(tiny_root), "--out", str(tmp_path / "out")
    )
    assert code == 0, complaint
    *others, last = pd.read_csv(tmp_path / "out" / "per_class.csv").to_dict("records")
    assert (last["class"], last["images"]) == ("Red Bird", 0) and np.isnan(last["accuracy"])
    assert all(row["images"] == 2 and row["accuracy"] >= 0 for row in others)


def test_the_same_classes_numbered_otherwise_are_known_by_their_names(tiny_root, checkpoint, tmp_path, run_main):
    """The same photographs of the same species: the same figures, whatever number a species has in the data."""
    index = tiny_root / "CUB_200_2011"
    outputs = [tmp_path / "before", tmp_path / "after"]
    for output in outputs:
        code, _, complaint = run_main(evaluate.main, str(checkpoint), "--data", str(tiny_root), "--out", str(output))
        assert code == 0, complaint
        for file, column in (("classes.txt", 0), ("image_class_labels.txt", 1)):
            rows = [line.split() for line in (index / file).read_text().splitlines()]
            for row in rows:
                row[column] = str(6 - int(row[column]))
            (index / file).write_text("".join(" ".join(row) + "\n" for row in rows))
    for file in ("report.json", "per_class.csv", "confusion_matrix.csv", "predictions.csv"):
        assert (outputs[0] / file).read_text() == (outputs[1] / file).read_text()


def test_predict_bird_names_five_species_and_draws(tiny_root, checkpoint, tmp_path, run_main):
    image = read_cub(tiny_root).test[0].path
    arguments = [str(image), "--weights", str(checkpoint), "--saliency", "--out", str(tmp_path / "drawn")]
    code, said, _ = run_main(predict_bird.main, *arguments)
    assert code == 0
    shares = [float(line.split("%")[0]) for line in said.splitlines()[1:6]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert Image.open(tmp_path / "drawn" / f"{image.stem}_saliency.png").size == (64, 32)
    code, _, complaint = run_main(predict_bird.main, "nowhere.jpg", "--weights", str(checkpoint))
    assert code == 2
    assert "nowhere.jpg: no such file" in complaint


def test_saliency_points_at_what_the_network_looks_at(checkpoint):
    classifier = BirdClassifier(checkpoint)

    class LeftHalf(torch.nn.Module):
        def forward(self, images):
            return images[..., :16].mean((2, 3)) @ torch.eye(3, 5)

    classifier.model = LeftHalf()
    heat = classifier.saliency(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), label=1)
    assert heat.shape == (32, 32)
    assert (heat[:, :14] > 0.9).all()
    assert (heat[:, 18:] < 0.1).all()


def test_saliency_is_the_mean_over_noisy_copies(checkpoint):
    """The gradient of a square is 2 x: without noise nothing where the image has the mean colour."""
    classifier = BirdClassifier(checkpoint)

    class Square(torch.nn.Module):
        def forward(self, images):
            return images.square().sum((1, 2, 3))[:, None]

    classifier.model = Square()
    image = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    image[..., :16] = 127  # 0.5 of 255, rounded down
    plain, noisy = (classifier.saliency(image, label=0, noise=noise) for noise in (0.0, 0.5))
    torch.testing.assert_close(plain[:, :15], torch.zeros(32, 15), atol=1e-2, rtol=0)
    torch.testing.assert_close(plain[:, 17:], torch.ones(32, 15), atol=1e-2, rtol=0)
    assert noisy[:, :15].std() > 0.02
    assert noisy[:, :15].mean() < noisy[:, 17:].mean()


def test_predict_bird_keeps_equal_names_apart_and_goes_on_after_an_odd_file(tiny_root, checkpoint, tmp_path, run_main):
    birds = read_cub(tiny_root).test
    for name, bird in (("d1/a.jpg", birds[0]), ("d2/a.jpg", birds[-1])):
        (tmp_path / name).parent.mkdir()
        shutil.copy(bird.path, tmp_path / name)
    (tmp_path / "d1" / "b.jpg").write_text("no photograph")
    out = tmp_path / "drawn"
    files = [str(tmp_path / "d1"), str(tmp_path / "d2")]
    words = [*files, "--weights", str(checkpoint.parent), "--saliency", "--out"]
    code, said, complaint = run_main(predict_bird.main, *words, str(out))
    assert code == 2
    assert [line for line in said.splitlines() if line.endswith("a.jpg")] == [f"{file}/a.jpg" for file in files]
    warning, error = complaint.splitlines()
    assert "d1/b.jpg: cannot be read as an image" in warning
    assert "1 of 3 files could not be read" in error
    first, second = (Image.open(out / f"{name}_saliency.png") for name in ("a", "a-2"))
    assert first.tobytes() != second.tobytes()

    Image.new("RGB", (9, 9)).save(tmp_path / "d2" / "a_saliency.png")
    code, _, complaint = run_main(predict_bird.main, files[1], *words[2:], files[1])
    assert code == 2
    assert "a_saliency.png: is one of the files to read" in complaint
    assert Image.open(tmp_path / "d2" / "a_saliency.png").size == (9, 9)


def test_a_mirror_averages_the_probabilities_of_both_views():
    torch.manual_seed(0)
    model = build_model("test_resnet", 5).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        both = WithMirror(model)(images)
        plain, mirrored = model(images).softmax(1), model(images.flip(3)).softmax(1)
        torch.testing.assert_close(both.exp(), (plain + mirrored) / 2)
        torch.testing.assert_close(WithMirror(model)(images.flip(3)), both)
    assert not torch.allclose(plain, mirrored, atol=1e-4)
