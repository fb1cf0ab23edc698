"""Names with markup are shown as they are, and run nothing, in the report and on the page."""

import json
from pathlib import Path

from playwright.sync_api import Page, expect

from classification import load
from detection.voc_annotations import annotation_xml
from tests.tools.scenes import COLOURS, draw_scene
from tools import eval_detections
from tools.app import Models, build_page
from tools.report.__main__ import main as report

HOSTILE = "<img src=x onerror=\"document.title='hurt'\">"


def test_in_the_report(page: Page, make_detector, tmp_path: Path) -> None:
    names = {name: f"{HOSTILE}{name}" for name in COLOURS}
    run, data = tmp_path / "runs" / "faster_rcnn_R_50_FPN", tmp_path / "voc"
    make_detector(run, "faster_rcnn_R_50_FPN", list(names.values()), data)
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (data / folder).mkdir(parents=True)
    image, objects = draw_scene(48, 64, 0)
    file = f"{HOSTILE}.png"
    image.save(data / "JPEGImages" / file)
    boxes = [(names[name], (x0 - 1, y0 - 1, x1, y1)) for name, x0, y0, x1, y1 in objects]
    (data / "Annotations" / f"{HOSTILE}.xml").write_text(annotation_xml(file, 48, 64, boxes))
    for split in ("trainval", "test"):
        (data / "ImageSets/Main" / f"{split}.txt").write_text(f"{HOSTILE}\n")
    found = [
        {"image_id": HOSTILE, "category": name, "bbox": [int(x0), int(y0), int(x1 - x0), int(y1 - y0)], "score": 0.9}
        for name, (x0, y0, x1, y1) in boxes
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(found))
    eval_detections.main([str(tmp_path / "boxes.json"), "--data", str(data), "--out", str(run)])

    report(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    page.goto((tmp_path / "report" / "index.html").as_uri())
    expect(page.get_by_text(f"{HOSTILE}red").first).to_be_attached()
    assert page.title() != "hurt"
    assert page.locator("img[onerror]").count() == 0


def test_on_the_page(page: Page, make_classifier, tmp_path: Path) -> None:
    bird = load(make_classifier(tmp_path / "bird", [f"{HOSTILE}{number}" for number in range(2)]))
    draw_scene(48, 64, 0)[0].save(tmp_path / "whole.png")
    (tmp_path / f"{HOSTILE}.png").write_text("no picture")
    blocks = build_page(Models(None, None, bird), 0.5)
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        page.goto(address)
        page.set_input_files("input[type=file]", tmp_path / "whole.png")
        expect(page.get_by_text(f"{HOSTILE}1").first).to_be_visible(timeout=20_000)
        page.set_input_files("input[type=file]", tmp_path / f"{HOSTILE}.png")
        expect(page.get_by_text("cannot be read as an image").first).to_be_visible(timeout=20_000)
        assert page.title() != "hurt"
        assert page.locator("img[onerror]").count() == 0
    finally:
        blocks.close()
