"""A page that shows the trained models on a photograph: `make app`, then http://127.0.0.1:7860 in a browser.

Both detectors, what Faster R-CNN's first stage proposed, and the five likeliest birds. The page needs no network.
"""

import copy
import html
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
from detectron2.structures import Instances
from gradio.components import Component

from classification.predict import BirdClassifier, newest_classifier
from common.data_root import SAMPLE
from common.errors import ArgumentParser, UserError, exits_on_user_error
from common.images import read_image
from common.prediction import Prediction, parse_score
from detection.drawing import Picture, class_colors
from detection.experiment import newest_detector
from detection.exported import ExportedDetector
from detection.modeling import start_by_model
from detection.predict import Detector
from tools.predict import draw, load_model
from tools.visualize_proposals import draw_proposals, propose_and_detect

FASTER_RCNN, YOLOV3, BIRDS = "Faster R-CNN", "YOLOv3", "Bird classifier"
TARGETS = {FASTER_RCNN: "train-frcnn", YOLOV3: "train-yolov3", BIRDS: "finetune"}
DETECTORS = {FASTER_RCNN: "faster_rcnn", YOLOV3: "yolov3"}
VARIABLES = {FASTER_RCNN: "FRCNN", YOLOV3: "YOLOV3", BIRDS: "BIRD"}
TITLE = "Birds and boxes"
PROPOSALS = "Proposals"
MAX_UPLOADED_PIXELS = 64_000_000  # a page holds several pictures at a time
MAX_UPLOADED_BYTES = 100_000_000
MAX_QUEUE = 16  # photographs that wait for the models
CSS = ".picture img { padding-top: 2rem }"  # or the caption lies over the picture


class Models(NamedTuple):
    """The models of a page; None in the place of one that is missing."""

    frcnn: Detector | None
    yolov3: Detector | None
    bird: BirdClassifier | None


def newest_models(output: Path) -> dict[str, str]:
    """Weights of the newest run of each model that there is, by its name."""
    detectors = {name: newest_detector(output, model) for name, model in DETECTORS.items()}
    found = {**detectors, BIRDS: newest_classifier(output)}
    return {name: str(path) for name, path in found.items() if path}


def load_models(weights: dict[str, str]) -> Models:
    """Loads the models of a page.

    Raises:
        UserError: weights are broken, or of another model than their name says.
    """
    loaded: dict[str, Any] = {}
    for name, path in weights.items():
        model = load_model(path, DETECTORS.get(name, "faster_rcnn"))
        kind = model.name if isinstance(model, Detector) else BIRDS
        if kind != name:
            raise UserError(f"{path}: is a {kind}, expected a {name} for {VARIABLES[name]}=")
        loaded[name] = model
    return Models(loaded.get(FASTER_RCNN), loaded.get(YOLOV3), loaded.get(BIRDS))


def read_photograph(path: Path) -> torch.Tensor:
    """The pixels of an uploaded file, uint8 (3, H, W), RGB.

    Raises:
        UserError: it is no whole image, or unfolds to too many pixels; the message names the file without its folder.
    """
    try:
        return read_image(path, MAX_UPLOADED_PIXELS)
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


def build_page(models: Models, score: float, examples: Sequence[Path] = ()) -> gr.Blocks:
    """Lays out the page.

    Args:
        models: a missing one is replaced by the command that trains it.
        score: objects below it are not shown.
        examples: photographs to choose from.
    """
    frcnn, yolov3, bird = models
    has_proposals = frcnn is not None and not isinstance(frcnn.model, ExportedDetector)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nDrop a photograph: both detectors look for objects in it, the classifier for a bird.")
        seen = gr.State()  # the photograph, small enough to be kept for every page that is open, and its proposals
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photograph = gr.Image(label="Photograph", sources=["upload", "clipboard"], height=320, buttons=[])
                # Passed on as the uploaded file: when Gradio reads a broken one itself, nobody learns why. It writes a
                # .pyi beside the source of every subclass of its components, so the method is replaced instead.
                photograph.preprocess = lambda payload: payload.path if payload else None  # type: ignore[method-assign]
                if examples:
                    chosen = gr.Examples([str(path) for path in examples], photograph, label="Drawn examples")
                parts = {BIRDS: _part(BIRDS, bird, partial(gr.Label, num_top_classes=5))}
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    parts |= {
                        name: _part(name, model, _picture) for name, model in ((FASTER_RCNN, frcnn), (YOLOV3, yolov3))
                    }
                proposed = _picture(PROPOSALS, visible=has_proposals)
                count = gr.Slider(
                    1,
                    300,
                    50,
                    step=1,
                    label="Proposals shown",
                    info="The best of Faster R-CNN's first stage; the brighter, the likelier an object",
                    visible=has_proposals,
                )

        def clear() -> dict[Component, Any]:
            shown: dict[str, Component] = {PROPOSALS: proposed, **parts}
            shown = {name: part for name, part in shown.items() if not isinstance(part, gr.Markdown)}
            return {seen: None, **{part: gr.update(value=None, label=name) for name, part in shown.items()}}

        def look(path: str, topk: int) -> dict[Component, Any]:
            try:
                image = read_photograph(Path(path))
            except UserError as error:
                gr.Warning(html.escape(str(error)))  # which shows HTML
                return clear() | {photograph: None}
            # Left out, it would become another component for the rest of the session, with Gradio's own reading.
            results: dict[Component, Any] = {photograph: path}
            if frcnn is not None and has_proposals:
                proposals, found = propose_and_detect(frcnn, image)
                results[parts[FASTER_RCNN]] = _show_objects(frcnn, image, found.above(score))
                shown = Picture(image), proposals
                results |= {seen: shown, proposed: _show_proposals(shown, topk)}
            elif frcnn is not None:
                results[parts[FASTER_RCNN]] = _show_objects(frcnn, image, frcnn.predict(image, score))
            if yolov3 is not None:
                results[parts[YOLOV3]] = _show_objects(yolov3, image, yolov3.predict(image, score))
            if bird is not None:
                likeliest = bird.predict(image)
                results[parts[BIRDS]] = dict(zip(likeliest.names, likeliest.scores.tolist(), strict=True))
            return results

        everything = [photograph, seen, proposed, *parts.values()]
        photograph.upload(look, [photograph, count], everything)
        if examples:
            chosen.load_input_event.then(look, [photograph, count], everything)
        photograph.clear(clear, None, everything)
        count.input(_show_proposals, [seen, count], proposed, show_progress="hidden", trigger_mode="always_last")
    return page.queue(max_size=MAX_QUEUE)


def _picture(label: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        label=label,
        visible=visible,
        interactive=False,
        format="jpeg",
        buttons=["download", "fullscreen"],
        min_width=280,
        height=380,
        elem_classes="picture",
    )


def _part(name: str, model: Detector | BirdClassifier | None, make: Callable[..., Component]) -> Component:
    if model is not None:
        return make(label=name)
    return gr.Markdown(
        f"**{name}** is not trained yet. Run `make {TARGETS[name]}`, then `make app` again.", container=True
    )


def _show_objects(detector: Detector, image: torch.Tensor, found: Prediction) -> gr.Image:
    drawn = draw(Picture(image), found, class_colors(detector.class_names))
    return gr.Image(drawn, label=f"{detector.name}: {len(found)} object{'s' * (len(found) != 1)}")


def _show_proposals(seen: tuple[Picture, Instances] | None, topk: int) -> gr.Image:
    if seen is None:
        return gr.skip()
    picture, proposals = copy.deepcopy(seen[0]), seen[1]
    draw_proposals(picture, proposals[:topk])
    return gr.Image(picture.pixels, label=f"{PROPOSALS}: {len(proposals[:topk])} best of {len(proposals)}")


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Loads the models and serves the page until it is interrupted.

    Args:
        argv: the command line without the program's name; None takes that of the process.

    Raises:
        UserError: a model cannot be loaded, or the address cannot be listened on.
    """
    parser = ArgumentParser(prog="tools.app", description=__doc__.splitlines()[0])
    for name, variable in VARIABLES.items():
        coco = "" if variable == "BIRD" else ", or coco"
        parser.add_argument(f"--{variable.lower()}", help=f"weights of {name}{coco}; default those of the newest run")
    parser.add_argument("--start", help="coco for both third-party detectors, or one as a file or a name of a hub")
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--score", type=parse_score, default=0.5, help="objects shown have at least this score")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (7860)")
    args = parser.parse_args(argv)
    if not 1 <= args.port <= 65535:
        raise UserError(f"PORT={args.port}: expected a number from 1 to 65535")
    given = {name: path for name, variable in VARIABLES.items() if (path := getattr(args, variable.lower()))}
    by_model = start_by_model(args.start)
    started = {name: by_model[model] for name, model in DETECTORS.items() if model in by_model}
    weights = newest_models(args.output) | started | given
    models = load_models(weights)
    for name, target in TARGETS.items():
        print(f"{name}: {weights.get(name, f'not trained yet, make {target}')}")
    examples = sorted((SAMPLE / "VOC2007/JPEGImages").glob("*.jpg"))[:3]
    page = build_page(models, args.score, examples)
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own page whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", args.host]))
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            share=False,
            ssr_mode=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            css=CSS,
            max_file_size=MAX_UPLOADED_BYTES,
            theme=gr.themes.Default(
                primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
        )
    except OSError as error:
        raise UserError(
            f"{args.host}:{args.port}: cannot listen there ({error}); give another HOST= or PORT="
        ) from error
    print(f"Open http://{args.host}:{args.port} in a browser; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
