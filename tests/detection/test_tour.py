"""The notebook, from top to bottom on a tiny data set, against the evaluation of the command line."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from detection.trainer import Evaluator
from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_keeps_no_results() -> None:
    assert NOTEBOOK["nbformat"] == 4
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_the_notebook_runs_from_top_to_bottom(
    voc_folder: Path, tiny_opts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter starts
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    namespace: dict = {}
    for number, source in enumerate(CODE):
        exec(compile(source, f"cell {number} of docs/tour.ipynb", "exec"), namespace)
        if "OPTIONS = " in source:
            namespace |= {"DATA": str(voc_folder), "OUTPUT": str(tmp_path), "OPTIONS": tiny_opts}

    assert namespace["weights"].is_relative_to(tmp_path)
    # What is computed from predictions in Python is what the evaluation of the command line says.
    detector = namespace["detector"]
    expected = Evaluator(detector.cfg).evaluate(detector.model)
    assert namespace["evaluation"].metrics == pytest.approx(expected, abs=1e-3)
    assert namespace["errors"].ap50 == pytest.approx(expected["AP50"], abs=1e-3)
    assert len(namespace["proposals"]) > 0
    assert np.ptp(namespace["picture"].pixels) > 0
