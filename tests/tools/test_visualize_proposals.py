"""Pictures of proposals beside detections, by a very small untrained detector."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.tools.scenes import draw_scene
from tools.visualize_proposals import COLORMAP, main

RUN = "faster_rcnn_R_50_FPN-sample"  # of `output`


def test_a_score_in_percent_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--score", "50"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert (exit.value.code, capsys.readouterr().err) == (2, "error: SCORE=50: expected a number from 0 to 1\n")


def test_a_config_of_which_there_is_no_run_is_not_trained_in_another_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--output", str(tmp_path), "--config", "mine.yaml"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "no trained Faster R-CNN of mine.yaml in it; expected WEIGHTS=path" in capsys.readouterr().err


def test_equal_names_stay_apart_and_an_odd_file_is_left_out(output, tmp_path, monkeypatch, capsys):
    files = [tmp_path / name for name in ("d1/a.png", "d2/a.png", "d2/cut.png")]
    for number, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        draw_scene(480, 640, number)[0].save(path)
    files[-1].write_bytes(files[-1].read_bytes()[:300])
    words = [*map(str, files), "--weights", str(output / RUN / "model_best.pth"), "--topk", "5", "--score", "0.15"]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert "warning: " in said.err and "d2/cut.png: cannot be read as an image" in said.err
    assert "2 pictures and proposals.json" in said.out

    folder = output / RUN / "proposals"
    records = json.loads((folder / "proposals.json").read_text())
    assert [(record["file_name"], record["picture"]) for record in records] == [
        (str(files[0]), "a.png"),
        (str(files[1]), "a-2.png"),
    ]
    for record in records:
        # On the left the best proposal is drawn on top, in the colour of its objectness.
        drawn = np.asarray(Image.open(folder / record["picture"]), dtype=int)
        best = record["proposals"][0]
        color = np.rint(255 * np.array(COLORMAP(best["objectness"])[:3]))
        assert (np.abs(drawn[:, :660] - color).max(axis=2) <= 2).sum() > 50
        assert len(record["proposals"]) > 5
        scores = [proposal["objectness"] for proposal in record["proposals"]]
        assert scores == sorted(scores, reverse=True)
