"""How good a classifier is and where it errs: one checkpoint in, tables and pictures out.

`python -m classification.evaluate WEIGHTS [--data DATA] [--tta] [--out FOLDER]`
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from classification.cub import FOLDER, Bird, read_cub
from classification.predict import BirdClassifier, data_of_run, newest_classifier
from classification.train import start_process
from common.data_root import data_facts, resolve_data_root
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.files import write_figure, write_json, write_table
from common.images import read_image, refuse_unreadable
from common.prediction import best_weights
from common.run_folder import record_session

CALIBRATION_BINS = 15
MOST_NAMED = 40  # classes whose names have room beside the matrix


class WithMirror(nn.Module):
    """Test-time augmentation: looks at each image and at its mirror image, and averages the probabilities.

    Args:
        model: maps images (N, 3, H, W) to logits (N, C).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logarithms of the averaged probabilities, float32 (N, C)."""
        views = torch.stack([self.model(images).float(), self.model(images.flip(-1)).float()])
        return views.log_softmax(2).logsumexp(0) - math.log(2)


def compute_logits(classifier: BirdClassifier, photographs: Sequence[Path]) -> Tensor:
    """Logits of all classes for each photograph, float32 (N, C)."""
    parts = []
    with tqdm(total=len(photographs), desc="images", unit="image", leave=False, disable=None) as progress:
        for batch in classifier.batches(photographs):
            parts.append(classifier.logits(torch.stack([sample["image"] for _, sample, _ in batch])))
            progress.update(len(batch))
    return torch.cat(parts)


@dataclass(frozen=True)
class Report:
    """The figures of one classifier on one set of images, in percent where not said otherwise.

    Attributes:
        images: how many.
        top1: images whose likeliest class is right.
        top5: images whose class is among the five likeliest.
        mean_class_accuracy: mean over the classes of their top-1.
        calibration_error: expected calibration error, over 15 bins of confidence.
        loss: cross entropy, in nats.
    """

    images: int
    top1: float
    top5: float
    mean_class_accuracy: float
    calibration_error: float
    loss: float


def measure(logits: Tensor, labels: Tensor) -> Report:
    """Computes all figures.

    Args:
        logits: (N, C).
        labels: (N,), every class of 0 .. C - 1 may or may not occur.
    """
    matrix = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    likeliest = logits.topk(min(5, logits.shape[1])).indices
    return Report(
        images=len(labels),
        top1=100 * np.trace(matrix) / len(labels),
        top5=100 * (likeliest == labels[:, None]).any(1).double().mean().item(),
        mean_class_accuracy=class_accuracy(matrix).mean(),
        calibration_error=100
        * sum(row["weight"] * abs(row["accuracy"] - row["confidence"]) for row in calibration(logits, labels)),
        loss=torch.nn.functional.cross_entropy(logits, labels).item(),
    )


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> np.ndarray:
    """Counts, int64 (C, C): rows are true classes, columns predicted ones."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1).numpy()


def class_accuracy(matrix: np.ndarray) -> pd.Series:
    """Top-1 of each class of a confusion matrix, in percent; nan where it has no image."""
    return 100 * pd.Series(np.diag(matrix)) / matrix.sum(1)


def calibration(logits: Tensor, labels: Tensor) -> list[dict[str, float]]:
    """Confidence against accuracy, in equal bins of confidence; empty bins are left out.

    Source: C. Guo et al. On Calibration of Modern Neural Networks. ICML 2017, equation 3.

    Returns:
        For each bin its share of the images (`weight`), and mean `confidence` and `accuracy` in [0, 1].
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS)
    return [
        {
            "weight": inside.double().mean().item(),
            "confidence": confidence[inside].mean().item(),
            "accuracy": correct[inside].mean().item(),
        }
        for inside in (bins == number for number in range(1, CALIBRATION_BINS + 1))
        if inside.any()
    ]


def confused_pairs(logits: Tensor, labels: Tensor, count: int = 10) -> list[dict[str, int]]:
    """The errors made most often.

    Returns:
        At most `count` rows, most frequent first, each with the `true` and `predicted` class, the number of `images`
        confused in this way, and as `example` the index of the one that the model was surest of.
    """
    confidence, predicted = logits.softmax(1).max(1)
    matrix = confusion_matrix(predicted, labels, logits.shape[1])
    np.fill_diagonal(matrix, 0)
    pairs = []
    for flat in np.argsort(-matrix, axis=None, kind="stable")[:count]:
        true, taken_for = (int(number) for number in np.unravel_index(flat, matrix.shape))
        if not matrix[true, taken_for]:
            break
        among = (labels == true) & (predicted == taken_for)
        example = int(torch.where(among, confidence, -1.0).argmax())
        pairs.append({"true": true, "predicted": taken_for, "images": int(matrix[true, taken_for]), "example": example})
    return pairs


def write_report(folder: Path, logits: Tensor, labels: Tensor, birds: list[Bird], class_names: list[str]) -> Report:
    """Writes report.json, the tables and the pictures into `folder`, and returns the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    report = measure(logits, labels)
    write_json(folder / "report.json", asdict(report))
    probability, predicted = logits.softmax(1).max(1)
    predictions = pd.DataFrame(
        {
            "image": [f"{bird.path.parent.name}/{bird.path.name}" for bird in birds],
            "class": [class_names[label] for label in labels.tolist()],
            "predicted": [class_names[label] for label in predicted.tolist()],
            "probability": probability.numpy(),
        }
    )
    write_table(folder / "predictions.csv", predictions, index=False, float_format="%.4f")
    matrix = confusion_matrix(predicted, labels, len(class_names))
    write_table(folder / "confusion_matrix.csv", pd.DataFrame(matrix, index=class_names, columns=class_names))
    accuracy = class_accuracy(matrix)
    per_class = pd.DataFrame({"class": class_names, "images": matrix.sum(1), "accuracy": accuracy})
    per_class = per_class.sort_values("accuracy", kind="stable")
    write_table(folder / "per_class.csv", per_class, index=False, float_format="%.2f")
    pairs = confused_pairs(logits, labels)
    table = pd.DataFrame(pairs, columns=["true", "predicted", "images", "example"])
    table["example"] = [birds[index].path.name for index in table["example"]]
    for column in ("true", "predicted"):
        table[column] = [class_names[label] for label in table[column]]
    write_table(folder / "confused_pairs.csv", table, index=False)

    write_figure(folder / "confusion_matrix.png", _draw_confusion_matrix(matrix, class_names), dpi=120)
    write_figure(folder / "confused_pairs.png", _draw_pairs(pairs, birds, labels, class_names))
    write_figure(folder / "calibration.png", _draw_calibration(calibration(logits, labels), report))
    write_figure(folder / "per_class.png", _draw_per_class(accuracy.dropna(), report))
    return report


def _draw_confusion_matrix(matrix: np.ndarray, class_names: list[str]) -> Figure:
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="magma_r", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class", title="Confusion matrix")
    if len(class_names) <= MOST_NAMED:
        axes.set_xticks(range(len(class_names)), class_names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(class_names)), class_names, parse_math=False)
    figure.colorbar(picture, ax=axes, label="% of the true class")
    return figure


def _draw_pairs(pairs: list[dict], birds: list[Bird], labels: Tensor, class_names: list[str]) -> Figure:
    rows = max(1, (len(pairs) + 1) // 2)
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    figure.suptitle("Most confused pairs: a picture taken for the other, and one of the class it was taken for")
    panels = figure.subplots(rows, 4, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for number, pair in enumerate(pairs):
        row, column = divmod(number, 2)
        other = int((labels == pair["predicted"]).int().argmax())
        taken, real = panels[row, 2 * column], panels[row, 2 * column + 1]
        taken.imshow(_square(birds[pair["example"]].path))
        title = f"{class_names[pair['true']]}\n{pair['images']} x taken for"
        taken.set_title(title, fontsize=8, parse_math=False)
        if labels[other] == pair["predicted"]:
            real.imshow(_square(birds[other].path))
        real.set_title(f"{class_names[pair['predicted']]}\n", fontsize=8, parse_math=False)
    return figure


def _square(path: Path) -> Image.Image:
    return ImageOps.fit(Image.fromarray(read_image(path).permute(1, 2, 0).numpy()), (224, 224))


def _draw_calibration(rows: list[dict[str, float]], report: Report) -> Figure:
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    axes.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], marker="o")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"Calibration, expected error {report.calibration_error:.1f} %")
    axes.grid(alpha=0.3)
    return figure


def _draw_per_class(accuracy: pd.Series, report: Report) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(accuracy, bins=range(0, 101, 5), color="#4477aa", edgecolor="white")
    axes.axvline(report.mean_class_accuracy, color="#cc3311", label=f"mean {report.mean_class_accuracy:.1f} %")
    axes.set(xlabel="accuracy of a class, %", ylabel="classes", title="Accuracy by class")
    axes.legend()
    return figure


@exits_on_user_error
def main() -> None:
    """Reads the command line, measures on the test split, writes and prints the report."""
    parser = ArgumentParser(description="Measure a classifier on the test split of CUB-200-2011.")
    parser.add_argument(
        "weights", type=Path, nargs="?", help="run folder, or a checkpoint in it; default the newest fine-tuned one"
    )
    parser.add_argument("--data", help=f"folder that holds {FOLDER}, or train/ and test/; default that of the run")
    parser.add_argument("--tta", action="store_true", help="look at the mirror image too")
    parser.add_argument(
        "--out", type=Path, help="folder to write to; beside the weights evaluation/, or evaluation_tta/, by default"
    )
    arguments = parser.parse_args()

    device = start_process()
    weights = arguments.weights or newest_classifier(Path("output"))
    if weights is None:
        raise UserError("output: no trained classifier in it; expected WEIGHTS=path, or run make finetune first")
    weights = best_weights(weights)
    classifier = BirdClassifier(weights, device)
    root, _ = resolve_data_root(arguments.data or data_of_run(weights), [FOLDER])
    cub = read_cub(root)
    names = classifier.class_names
    is_same = cub.class_names == names
    if not is_same and (sorted(cub.class_names) != sorted(names) or len(set(names)) < len(names)):
        raise UserError(
            f"{weights}: knows {len(names)} classes ({', '.join(names[:3])}, ...), "
            f"{root} has {len(cub.class_names)} ({', '.join(cub.class_names[:3])}, ...): name the data it was "
            "trained on with DATA="
        )
    # The data may number the same classes differently: the network's numbering is used.
    test = cub.test
    if not is_same:
        test = [bird._replace(label=names.index(cub.class_names[bird.label])) for bird in test]
    refuse_unreadable([bird.path for bird in test])
    if arguments.tta:
        classifier.model = WithMirror(classifier.model)
    folder = arguments.out or weights.parent / ("evaluation_tta" if arguments.tta else "evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    with record_session(folder, **data_facts(root), weights=str(weights)):
        logits = compute_logits(classifier, [bird.path for bird in test])
        report = write_report(folder, logits, torch.tensor([bird.label for bird in test]), test, names)
    print(f"{weights} on the test split of {root}, {report.images} images:")
    print(
        f"  top-1 {report.top1:.2f} %   top-5 {report.top5:.2f} %   mean of classes {report.mean_class_accuracy:.2f} %"
    )
    print(f"  expected calibration error {report.calibration_error:.2f} %   loss {report.loss:.3f}")
    print(f"Tables and pictures: {folder}")


if __name__ == "__main__":
    main()
