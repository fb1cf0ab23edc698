"""The page in a real browser, with very small untrained models behind it."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from common.errors import UserError
from tests.processes import free_port
from tools.app import MAX_QUEUE, Models, build_page, main, newest_models, read_photograph

ROOT = Path(__file__).resolve().parents[2]
expect.set_options(timeout=60_000)  # a page may take its time beside other tests


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Starts the app with some options on a free port; returns its address."""
    started = []

    def start(*options: str) -> str:
        words = [sys.executable, "-m", "tools.app", "--port", str(free_port()), *options]
        # Behind a proxy that does not answer, as in many companies.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9"}
        app = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(app)
        said = ""
        for line in app.stdout:
            said += line
            if match := re.search(r"Open (\S+) in a browser", line):
                return match[1]
        raise AssertionError(said)

    yield start
    for app in started:
        app.terminate()
        app.wait()
        app.stdout.close()


@pytest.fixture(scope="module")
def address(serve, output) -> str:
    return serve("--output", str(output), "--score", "0.15")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A photograph in several forms, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.full((300, 400, 3), 120, dtype=np.uint8)
    pixels[60:200, 50:180] = (200, 30, 30)
    pixels[120:260, 220:360] = (30, 30, 200)
    image = Image.fromarray(pixels)
    image.save(folder / "whole.jpg", quality=95)
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:1500])
    (folder / "text.jpg").write_text("This is no photograph.")
    (folder / "empty.jpg").touch()
    (folder / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    Image.new("L", (7000, 7000)).save(folder / "large.png")
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    turned = image.getexif()
    turned[0x0112] = 6  # to be shown turned to the right
    image.rotate(90, expand=True).save(folder / "turned.jpg", exif=turned, quality=95)
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "16 bits.png")
    image.save(folder / "moving.gif", save_all=True, append_images=[image.rotate(90)])
    return folder


def upload(page: Page, path: Path) -> None:
    page.set_input_files("input[type=file]", path)


def picture(page: Page, caption: str):
    """The part of the page with this caption and a picture in it."""
    return page.locator(".picture").filter(has_text=re.compile(rf"^\s*{caption}")).locator("img")


def test_a_photograph_goes_through_all_models(page, address, pictures):
    page.goto(address)
    upload(page, pictures / "whole.jpg")
    for caption in (r"Faster R-CNN: \d+ objects?\s*$", r"YOLOv3: \d+ objects?\s*$", r"Proposals: 50 best of \d+\s*$"):
        expect(picture(page, caption)).to_be_visible()
        assert picture(page, caption).evaluate("image => [image.naturalWidth, image.naturalHeight]") == [640, 480]
    named = page.get_by_text(re.compile(r"^Bird \d$"))
    assert len(set(named.all_inner_texts())) == 5

    # The slider draws again, other proposals and their number, and not the detections.
    detections = picture(page, "Faster R-CNN").get_attribute("src")
    before = picture(page, "Proposals: 50").get_attribute("src")
    page.locator("input[type=range]").fill("7")
    expect(picture(page, "Proposals: 7 best of")).not_to_have_attribute("src", before)
    assert picture(page, "Faster R-CNN").get_attribute("src") == detections

    # Taken away, it leaves an empty page.
    page.get_by_label("Remove Image").click()
    expect(page.locator(".picture img")).to_have_count(0)
    expect(named).to_have_count(0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.jpg", "text.jpg: cannot be read as an image"),
        ("cut.jpg", "cut.jpg: cannot be read as an image (Image is incomplete or truncated)"),
        ("empty.jpg", "empty.jpg: cannot be read as an image"),
        ("drawing.svg", "drawing.svg: cannot be read as an image"),
        ("bomb.png", "bomb.png: has more than 64,000,000 pixels"),
    ],
)
def test_what_is_no_photograph_is_refused_kindly(page, address, pictures, name, message):
    page.goto(address)
    upload(page, pictures / name)
    expect(page.get_by_text(message)).to_be_visible()
    expect(page.locator(".picture img")).to_have_count(0)
    # Once it has taken the file away the page takes the next one.
    expect(page.get_by_role("button", name="Drop an image file here to upload")).to_be_visible()
    upload(page, pictures / "whole.jpg")
    expect(picture(page, r"Faster R-CNN: \d+ objects?\s*$")).to_be_visible()


@pytest.mark.parametrize("name", ["cmyk.jpg", "turned.jpg", "16 bits.png", "moving.gif", "large.png"])
def test_unusual_photographs_are_shown(page, address, pictures, name):
    page.goto(address)
    upload(page, pictures / name)
    expect(picture(page, r"YOLOv3: \d+ objects?\s*$")).to_be_visible()


def test_unusual_photographs_are_read_as_they_look(pictures):
    whole = read_photograph(pictures / "whole.jpg").float()
    for name in ("cmyk.jpg", "turned.jpg", "moving.gif"):
        assert (read_photograph(pictures / name).float() - whole).abs().mean() < 4, name
    red = whole[:1].expand(3, -1, -1)
    assert (read_photograph(pictures / "16 bits.png").float() - red).abs().mean() < 4


def test_messages_name_the_file_and_no_folder(pictures):
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "drawing.svg", "bomb.png"):
        with pytest.raises(UserError) as error:
            read_photograph(pictures / name)
        assert str(error.value).startswith(name)
        assert str(pictures) not in str(error.value)


def test_page_without_models_says_what_makes_them(page, serve, tmp_path):
    page.goto(serve("--output", str(tmp_path)))
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        for target in ("train-frcnn", "train-yolov3", "finetune"):
            expect(page.get_by_text(f"make {target}")).to_be_visible()
        expect(page.locator("input[type=range]")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_while_one_photograph_is_looked_at_the_page_answers_and_a_long_queue_is_refused(
    browser: Browser, pictures, monkeypatch
):
    begun, may_end, page = threading.Event(), threading.Event(), browser.new_page()

    def wait(path: Path) -> None:
        begun.set()
        may_end.wait(60)
        raise UserError("enough")

    monkeypatch.setattr("tools.app.read_photograph", wait)
    blocks = build_page(Models(None, None, None), 0.5)
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        with (pictures / "whole.jpg").open("rb") as file:
            (path,) = requests.post(f"{address}gradio_api/upload", files={"files": file}).json()
        photograph = {"path": path, "meta": {"_type": "gradio.FileData"}}

        def ask(number: int) -> requests.Response:
            question = {"data": [photograph, 50], "fn_index": 0, "session_hash": str(number)}
            return requests.post(f"{address}gradio_api/queue/join", json=question, timeout=10)

        assert ask(0).status_code == 200
        assert begun.wait(20)
        assert [ask(number).status_code for number in range(1, MAX_QUEUE + 3)] == [200] * MAX_QUEUE + [503] * 2
        page.goto(address)
        upload(page, pictures / "whole.jpg")
        expect(page.get_by_text(re.compile("busy|[Qq]ueue is full")).first).to_be_visible(timeout=10_000)
    finally:
        may_end.set()
        page.close()
        blocks.close()


def test_newest_runs_are_found(output, tmp_path):
    found = {name: Path(path).parent.name for name, path in newest_models(output).items()}
    assert found == {
        "Faster R-CNN": "faster_rcnn_R_50_FPN-sample",
        "YOLOv3": "yolov3_darknet53_study",
        "Bird classifier": "resnet18-best-2",
    }
    assert newest_models(tmp_path) == {}


def test_weights_of_another_model_wrong_numbers_and_a_taken_port(output, address, capsys):
    for options, message in (
        (["--frcnn", str(output / "resnet18-best-2")], "is a Bird classifier, expected a Faster R-CNN for FRCNN="),
        (["--port", "78600"], "PORT=78600: expected a number from 1 to 65535"),
        (["--score", "nan"], "SCORE=nan: expected a number from 0 to 1"),
        (["--port", address.rpartition(":")[2]], "cannot listen there"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["--output", str(output), *options])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
