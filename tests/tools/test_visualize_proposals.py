"""Pictures of proposals beside detections, by a very small untrained detector."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from tests.tools.scenes import draw_scene, draw_voc
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
    folder = tmp_path / "seen"
    words = [*map(str, files), "--weights", str(output / RUN / "model_best.pth"), "--topk", "5", "--score", "0.15"]
    words += ["--out", str(folder)]
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    said = capsys.readouterr()
    assert "warning: " in said.err and "d2/cut.png: cannot be read as an image" in said.err
    assert "2 pictures and proposals.json" in said.out

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
        assert (record["height"], record["width"]) == (480, 640)
        x, y, width, height = np.array([proposal["bbox"] for proposal in record["proposals"]]).T
        assert (x + width).max() <= 640.01 and (y + height).max() <= 480.01
        scores = [proposal["objectness"] for proposal in record["proposals"]]
        assert scores == sorted(scores, reverse=True)


def test_recall_is_of_the_objects_that_are_not_difficult(output, tmp_path, monkeypatch, capsys):
    draw_voc(tmp_path)
    for number in (4, 5):
        path = tmp_path / f"Annotations/{number}.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    (tmp_path / "ImageSets/Main/test.txt").write_text("4\n5\n6\n")
    run = shutil.copytree(output / RUN, tmp_path / "run", ignore=shutil.ignore_patterns("proposals"))
    monkeypatch.setattr(sys, "argv", ["program", "--weights", str(run), "--data", str(tmp_path)])
    main()
    assert "on 3 images of voc_test, 4 objects, difficult ones left out" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "proposals").glob("?.png")) == ["4.png", "5.png", "6.png"]
