"""What a detector starts from: files known by what they hold, third-party detectors, classes carried over."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import box_iou

from common.errors import UserError
from common.weights import read_checkpoint, save_checkpoint
from detection import starts
from detection.checkpoint import load_initial_weights
from detection.classes import COCO_CLASSES, in_words_of, pair_classes
from detection.config import CONFIGS, get_cfg, merge_file
from detection.data_checks import check_classes, check_datasets
from detection.dataset_mapper import DatasetMapper
from detection.experiment import new_experiment, use_test_data
from detection.modeling import load_detector
from detection.starts import foreign_cfg, identify, read_leaf, resolve_start, set_classes
from detection.train_net import parse_args
from detection.voc import VOC_CLASSES, load_voc_instances
from detection.yolov3.darknet_weights import write_darknet_weights
from tests.detection.runs import NAME, assert_one_line
from tools import convert_darknet

OWN = ["dog", "zebra fish", "couch"]  # two of COCO's and one that no one knows


def tiny(classes: list[str] | tuple[str, ...]) -> tuple[nn.Module, CfgNode]:
    """yolov3-tiny in Darknet's arithmetic, every value drawn."""
    cfg = read_leaf("yolov3_tiny_coco", ["MODEL.DEVICE", "cpu", "MODEL.PRECISION", "float32"])
    set_classes(cfg, classes)
    torch.manual_seed(len(classes))
    model = build_model(cfg).eval()
    for name, value in model.state_dict().items():
        if value.dim() == 1 and value.is_floating_point() and "pixel" not in name:
            value.uniform_(0.5, 1.5)
    return model, cfg


@pytest.fixture(scope="module")
def coco_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yolov3-tiny for COCO as Darknet would have written it, under a name that says nothing."""
    path = tmp_path_factory.mktemp("darknet") / "weights.bin"
    write_darknet_weights(path, tiny(COCO_CLASSES)[0])
    return path


def test_the_published_tiny_has_the_anchors_that_it_was_trained_with(shared: Path, tmp_path: Path) -> None:
    """On real photographs it finds far more with them than with those of Darknet's present cfg, `mask = 0,1,2`."""
    for folder in ("Annotations", "ImageSets", "JPEGImages"):  # links keep the cache out of the shared folder
        (tmp_path / folder).symlink_to(shared / "datasets" / "VOC2007" / folder)
    records = load_voc_instances(tmp_path, "test", VOC_CLASSES)[:25]

    def share_found(*options: str) -> float:
        """Of the objects that are not difficult, with an IoU of 0.5."""
        cfg, model = load_detector(shared / "weights" / "yolov3-tiny.weights", options, classes=VOC_CLASSES)
        found = []
        for record in records:
            truth = [each for each in record["annotations"] if not each["difficult"]]
            sample = DatasetMapper(cfg, False)(record)
            with torch.inference_mode():
                boxes = model([sample])[0]["instances"]
            boxes = boxes[boxes.scores > 0.25]
            for each in truth:
                of_class = boxes.pred_boxes.tensor[boxes.pred_classes == each["category_id"]]
                found.append(bool((box_iou(torch.tensor([each["bbox"]]), of_class) > 0.5).any()))
        return float(np.mean(found))

    present_cfg = "[[[10, 14], [23, 27], [37, 58]], [[81, 82], [135, 169], [344, 319]]]"
    published = share_found()
    assert published > 0.3
    assert published > 1.3 * share_found("MODEL.YOLOV3.ANCHORS", present_cfg)


def raw_predictions(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """(anchors, 5 + classes, H, W) of each level."""
    with torch.no_grad():
        features = model.backbone(image)
        levels = model.head([features[name] for name in model.head_in_features])
    return [level[0].unflatten(0, (3, -1)) for level in levels]


def test_cocos_names_and_vocs_are_paired() -> None:
    pairs = {VOC_CLASSES[new]: COCO_CLASSES[old] for old, new in pair_classes(COCO_CLASSES, VOC_CLASSES)}
    assert len(pairs) == 20
    others = {
        "aeroplane": "airplane",
        "motorbike": "motorcycle",
        "diningtable": "dining table",
        "pottedplant": "potted plant",
        "sofa": "couch",
        "tvmonitor": "tv",
    }
    assert pairs == {**{name: name for name in VOC_CLASSES}, **others}
    assert pair_classes(["Dining_Table", "hot-dog"], ["dog", "diningtable", "hot dog", "zebra"]) == [(0, 1), (1, 2)]
    assert in_words_of(["Dining_Table", "dog"], ["diningtable", "zebra"]) == ["Dining_Table", "zebra"]


def test_classes_that_differ_in_case_or_a_hyphen_alone_stay_apart() -> None:
    names = ["a", "A", "t-1", "t1"]
    assert pair_classes(names, names) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert in_words_of(names, names) == names
    assert pair_classes(names, ["T1"]) == []  # which of the two?
    assert pair_classes(["dog"], ["Dog", "dog"]) == [(0, 1)]


def test_yolov3_detects_the_classes_it_knows_before_its_first_step(
    coco_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = tiny(COCO_CLASSES)
    model, cfg = tiny(OWN)
    cfg.MODEL.WEIGHTS = str(coco_file)
    before = raw_predictions(model, image := torch.rand(1, 3, 64, 96))
    with caplog.at_level(logging.INFO, "detection"):
        load_initial_weights(model, cfg)
    assert "Classes carried over by name: dog, couch; random: zebra fish" in caplog.text
    for mine, theirs, mine_before in zip(
        raw_predictions(model, image), raw_predictions(source, image), before, strict=True
    ):
        for here, there in (*((place, place) for place in range(5)), (5, 5 + 16), (7, 5 + 57)):  # dog, couch
            torch.testing.assert_close(mine[:, here], theirs[:, there])
        assert not torch.equal(mine[:, 6], mine_before[:, 6])  # its features are COCO's now, its own rows are not
    fresh = dict(tiny(OWN)[0].named_parameters())
    for name, value in model.named_parameters():
        if name.endswith("prediction.weight"):
            assert torch.equal(value.view(3, 8, -1)[:, 6], fresh[name].view(3, 8, -1)[:, 6])


def test_faster_rcnn_carries_classes_over(tmp_path: Path, tiny_opts: list[str]) -> None:
    """From a run whose configuration names its classes; box deltas and background go along."""

    def detector(classes: list[str]) -> tuple[nn.Module, CfgNode]:
        cfg = get_cfg()
        merge_file(cfg, CONFIGS / "Base-FasterRCNN.yaml")
        cfg.merge_from_list(tiny_opts)
        cfg.MODEL.DEVICE, cfg.MODEL.PRECISION = "cpu", "float32"
        set_classes(cfg, classes)
        return build_model(cfg).eval(), cfg

    source, source_cfg = detector(["cat", "sofa", "dog"])
    nn.init.normal_(source.roi_heads.box_predictor.cls_score.bias)
    save_checkpoint(tmp_path / "model_best.pth", {"model": source.state_dict()})
    (tmp_path / "config.yaml").write_text(source_cfg.dump())
    model, cfg = detector(OWN)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_best.pth")
    load_initial_weights(model, cfg)
    pooled = torch.randn(4, source.roi_heads.box_predictor.cls_score.in_features)
    scores, deltas = model.roi_heads.box_predictor(pooled)
    expected_scores, expected_deltas = source.roi_heads.box_predictor(pooled)
    torch.testing.assert_close(scores[:, [0, 2, 3]], expected_scores[:, [2, 1, 3]])  # dog, couch, background
    torch.testing.assert_close(deltas.view(4, 3, 4)[:, [0, 2]], expected_deltas.view(4, 3, 4)[:, [2, 1]])


def test_equal_numbers_of_other_classes_are_no_equal_classes(coco_file: Path) -> None:
    """Eighty classes in another order: each gets its own rows."""
    source, _ = tiny(COCO_CLASSES)
    model, cfg = tiny(COCO_CLASSES[::-1])
    cfg.MODEL.WEIGHTS = str(coco_file)
    load_initial_weights(model, cfg)
    image = torch.rand(1, 3, 64, 64)
    for mine, theirs in zip(raw_predictions(model, image), raw_predictions(source, image), strict=True):
        torch.testing.assert_close(mine[:, 5:].flip(1), theirs[:, 5:])


def test_darknets_detectors_are_known_by_their_size(coco_file: Path, tmp_path: Path) -> None:
    assert identify(str(coco_file)) == ("yolov3_tiny_coco", COCO_CLASSES)
    own = tmp_path / "own.weights"
    write_darknet_weights(own, tiny(OWN)[0])
    with pytest.raises(UserError, match=rf"{own}: detects 3 classes, {own.with_suffix('.names')} has 0 names"):
        identify(str(own))
    own.with_suffix(".names").write_text("\n".join(OWN) + "\n", encoding="utf-8-sig")  # as some editors save it
    assert identify(str(own)) == ("yolov3_tiny_coco", tuple(OWN))
    # A backbone alone, as darknet53.conv.74 is one, is no detector.
    write_darknet_weights(tmp_path / "tiny.conv.13", tiny(OWN)[0].backbone)
    assert identify(str(tmp_path / "tiny.conv.13")) is None


@pytest.mark.parametrize("leaf", sorted(starts.DARKNET_VALUES))
def test_sizes_are_those_of_the_networks(leaf: str) -> None:
    counts = []
    for classes in (1, 3):
        cfg = read_leaf(leaf, ["MODEL.DEVICE", "meta"])
        set_classes(cfg, [str(number) for number in range(classes)])
        state = build_model(cfg).state_dict()
        counts.append(sum(v.numel() for name, v in state.items() if "num_batches" not in name and "pixel" not in name))
    fixed, per_class = starts.DARKNET_VALUES[leaf]
    assert counts == [fixed + per_class, fixed + 3 * per_class]


@pytest.mark.parametrize("version", ["", "_v2"])
def test_torchvisions_detectors_are_known_by_their_tensors(tmp_path: Path, version: str) -> None:
    """As a file of another name; what they then compute is in test_torchvision_detectors.py."""
    torch.manual_seed(0)
    original = torchvision.models.get_model(f"fasterrcnn_resnet50_fpn{version}", weights=None, weights_backbone=None)
    torch.save(original.state_dict(), tmp_path / "file.bin")
    cfg, model = load_detector(tmp_path / "file.bin", ["MODEL.DEVICE", "cpu"])
    assert list(COCO_CLASSES) == cfg.MODEL.CLASSES
    categories = torchvision.models.detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    theirs = original.roi_heads.box_predictor.cls_score.weight
    ours = model.roi_heads.box_predictor.cls_score.weight
    for name in ("person", "zebra", "toothbrush"):
        assert torch.equal(ours[COCO_CLASSES.index(name)], theirs[categories.index(name)])


def test_torchvisions_detectors_of_other_classes_are_none_that_is_known(tmp_path: Path) -> None:
    """Their file does not say what they detect."""
    build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    torch.save(build(weights=None, weights_backbone=None, num_classes=5).state_dict(), tmp_path / "own.pth")
    assert identify(str(tmp_path / "own.pth")) is None


def test_detectors_of_the_zoo_are_known_by_their_tensors(tmp_path: Path) -> None:
    """A pickle, whatever its name; what it then computes is in test_zoo.py."""
    cfg = read_leaf("faster_rcnn_R_50_FPN_zoo", ["MODEL.DEVICE", "cpu"])
    set_classes(cfg, COCO_CLASSES)
    torch.manual_seed(0)
    arrays = {name: value.numpy() for name, value in build_model(cfg).state_dict().items()}
    path = tmp_path / "model_final.bin"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    assert identify(str(path)) == ("faster_rcnn_R_50_FPN_zoo", COCO_CLASSES)
    _, model = load_detector(path, ["MODEL.DEVICE", "cpu"])
    name = "roi_heads.box_predictor.cls_score.weight"
    np.testing.assert_array_equal(model.state_dict()[name], arrays[name])


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "run",)

    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    with pytest.raises(UserError) as error:
        load_detector(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_detector_of_others_is_used_as_it_is(coco_file: Path) -> None:
    cfg, model = load_detector(coco_file, ["MODEL.DEVICE", "cpu"])
    assert list(COCO_CLASSES) == cfg.MODEL.CLASSES
    (found,) = model([{"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}])
    assert found["instances"].pred_classes.max() < 80


@pytest.mark.parametrize(
    ("start", "weights"),
    [
        ("imagenet", None),
        ("random", ""),
        ("coco", "darknet://yolov3.weights"),
        ("yolov3-tiny.weights", "darknet://yolov3-tiny.weights"),
        ("resnet18", "timm://resnet18"),
        ("fasterrcnn_resnet50_fpn", "torchvision://FasterRCNN_ResNet50_FPN_Weights.COCO_V1"),
        ("timm://resnet18", "timm://resnet18"),
        ("somewhere/else.pth", "somewhere/else.pth"),
    ],
)
def test_words_of_a_start(start: str, weights: str | None) -> None:
    assert resolve_start(start, "yolov3") == weights


def test_run_folders_are_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model_best\.pth"):
        resolve_start(str(tmp_path), "yolov3")
    (tmp_path / "model_best.pth").touch()
    assert resolve_start(str(tmp_path), "yolov3") == f"{tmp_path}/model_best.pth"


def test_files_in_weights_serve_for_the_hubs(coco_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    Path("weights/yolov3-tiny.weights").write_bytes(coco_file.read_bytes())
    cfg = foreign_cfg("darknet://yolov3-tiny.weights", ["MODEL.DEVICE", "cpu"])
    with pytest.raises(UserError, match=r"weights/yolov3-tiny\.weights: its md5 is .*, expected 3bcd6b39"):
        load_initial_weights(build_model(cfg), cfg)
    torch.save(nn.Linear(1, 1).state_dict(), "weights/resnet18-f37072fd.pth")
    cfg.MODEL.WEIGHTS = "torchvision://ResNet18_Weights.IMAGENET1K_V1"
    with pytest.raises(UserError, match="does not fit the model"):  # it was read
        load_initial_weights(build_model(cfg), cfg)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
    ],
)
def test_what_is_saved_instead_of_weights(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        read_checkpoint(path)


def test_first_bytes_say_what_a_file_is(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.pth")
    assert torch.equal(read_checkpoint(tmp_path / "model.pth")["model"]["a"], torch.ones(2))
    torch.save({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "model.safetensors")["model"]["a"], torch.ones(2))


def test_evaluated_without_a_run(detector, coco_file: Path) -> None:
    flags = ("--model", "yolov3", "--eval-only", "--start", str(coco_file))
    sizes = ("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64")
    code, printed = detector.later("evaluated start", "--data", str(detector.data), *flags, opts=sizes)
    assert code == 0, printed
    assert "Classes carried over by name: none" in printed
    (folder,) = (detector.output / "evaluated start" / "starts").iterdir()
    assert set(json.loads((folder / "evaluation" / "evaluation.json").read_text())) >= {"AP50_11point"}


@pytest.fixture
def voc07(tmp_path: Path, voc_folder: Path) -> Path:
    """An official root of 2007 alone, with nothing but the test set's list."""
    root = tmp_path / "datasets"
    shutil.copytree(voc_folder, root / "VOC2007")
    (root / "VOC2007/labels.txt").unlink()
    (root / "VOC2007/ImageSets/Main/trainval.txt").unlink()
    for path in (root / "VOC2007/Annotations").iterdir():
        path.write_text(path.read_text().replace("red", "dog").replace("blue", "sofa"))
    return root


def test_a_run_on_cocos_classes_is_used_with_its_own_weights(coco_file: Path, tmp_path: Path) -> None:
    """Not with those that it started from, random ones or a file."""
    cfg = foreign_cfg(str(coco_file), ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    for name, value in model.named_parameters():
        if name.endswith("prediction.bias"):
            torch.nn.init.constant_(value, 0.123)
    torch.save({"model": model.state_dict()}, tmp_path / "model_best.pth")
    for start in ("", str(coco_file)):
        cfg.MODEL.WEIGHTS = start
        (tmp_path / "config.yaml").write_text(cfg.dump())
        _, loaded = load_detector(tmp_path)
        biases = [value for name, value in loaded.named_parameters() if name.endswith("prediction.bias")]
        assert biases and all((value == torch.tensor(0.123)).all() for value in biases)


def test_a_run_folder_of_cocos_classes_is_evaluated_by_their_names(
    coco_file: Path, voc_folder: Path, tmp_path: Path
) -> None:
    """What `tools.convert_darknet` writes finds what the file that it comes from finds."""
    convert_darknet.main([str(coco_file), str(tmp_path / "run" / "model_best.pth")])
    words = ["sofa", "zebra fish"]
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    found = []
    for source in (coco_file, tmp_path / "run"):
        cfg, model = load_detector(source, ["MODEL.PRECISION", "float32"], classes=words)
        assert words == cfg.MODEL.CLASSES
        instances = model([image])[0]["instances"]
        found.append(instances[instances.pred_classes == 0])  # the other class is random
    assert len(found[0]) > 5
    assert torch.equal(found[0].pred_boxes.tensor, found[1].pred_boxes.tensor)


def test_evaluated_on_what_has_nothing_to_train_on(detector, coco_file: Path, voc07: Path) -> None:
    words = ("--model", "yolov3", "--eval-only", "--start", str(coco_file), "--data", str(voc07))
    sizes = ("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64")
    code, printed = detector.later("evaluated on 2007", *words, opts=sizes)
    assert code == 0, printed
    assert "on voc07_test: AP50_11point" in printed
    outcome = detector.later("evaluated on 2007", *words, opts=(*sizes, "DATASETS.TRAIN", "('voc07_train',)"))
    assert_one_line(outcome, "DATASETS.TRAIN ('voc07_train',): nothing would come of it")


def test_what_was_not_trained_here_is_tested_on_the_data_that_is_here(
    coco_file: Path, voc07: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an exported or a converted third-party detector, whose configuration names no data."""
    (voc07 / "VOC2012").mkdir()
    monkeypatch.chdir(voc07.parent)
    cfg = foreign_cfg(str(coco_file))
    use_test_data(cfg, None)
    assert (cfg.DATASETS.ROOT, cfg.DATASETS.TEST) == ("datasets", ("voc07_test",))
    check_datasets(cfg, ["TEST"])
    with pytest.raises(UserError, match=r"knows 80 classes, .* has 20, not motorcycle, .* but .*; give the data"):
        check_classes(cfg, coco_file)


def test_darknets_backbone_is_computed_as_darknet_does(tmp_path: Path, voc_folder: Path) -> None:
    """Known by what it holds: the published one is called darknet53.conv.74."""
    options = ["MODEL.TIMM.NORM_EPS", 1e-6, "MODEL.TIMM.NEGATIVE_SLOPE", 0.1, "MODEL.DEVICE", "cpu"]
    backbone = build_model(read_leaf("yolov3_darknet53", [str(word) for word in options])).backbone
    path = tmp_path / "darknet53.conv.74"
    write_darknet_weights(path, backbone)
    words = ["--model", "yolov3", "--data", str(voc_folder), "--start", str(path), "MODEL.DEVICE", "cpu"]
    experiment = new_experiment(parse_args(words))
    experiment.resolve()
    model = build_model(experiment.cfg)
    load_initial_weights(model, experiment.cfg)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.eval()(image), backbone.eval()(image))
    assert (experiment.cfg.MODEL.PIXEL_MEAN, experiment.cfg.MODEL.PIXEL_STD) == ([0.0] * 3, [255.0] * 3)
    assert experiment.cfg.MODEL.YOLOV3.NORM_EPS == 1e-6  # of the head, which the file does not fill


def test_a_run_lends_its_network_and_the_recipe_its_way_of_training(detector, trained: Path) -> None:
    """The narrow network of the run is named nowhere on this command line."""
    pairs = zip(detector.opts[::2], detector.opts[1::2], strict=True)
    opts = [word for key, value in pairs if not key.startswith("MODEL.") for word in (key, value)]
    flags = ("--data", str(detector.data), "--start", str(trained))
    code, printed = detector.later("lent", *flags, opts=(*opts, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"))
    assert code == 0, printed
    old, new = (yaml.safe_load((run / "config.yaml").read_text()) for run in (trained, detector.output / "lent" / NAME))
    assert new["MODEL"] == {**old["MODEL"], "WEIGHTS": str(trained / "model_best.pth")}
    assert new["SOLVER"]["MAX_ITER"] == 2


def test_a_classifiers_run_fills_a_backbone_and_lends_no_network(voc_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "resnet50-best"
    run.mkdir()
    (run / "config.yaml").write_text("model: resnet50\nimage_size: 448\n")
    network = torchvision.models.resnet50(num_classes=3)
    save_checkpoint(run / "model_best.pth", {"model": network.state_dict(), "model_name": "resnet50"})
    words = ["--model", "faster_rcnn", "--recipe", "study", "--data", str(voc_folder), "--start", str(run)]
    experiment = new_experiment(parse_args(words))
    assert experiment.cfg.MODEL.RPN.SMOOTH_L1_BETA == 0.0  # as the study has it
    experiment.resolve()
    experiment.cfg.MODEL.DEVICE = "cpu"
    model = build_model(experiment.cfg)
    load_initial_weights(model, experiment.cfg)
    stem = model.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(stem, network.conv1.weight)


def test_contradictions_are_refused(detector, trained: Path, coco_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("_BASE_: faster_rcnn_R_50_FPN.yaml\nMODEL: {WEIGHTS: ''}\n")
    whole = ("--model", "yolov3", "--start", str(coco_file))
    run = ("--eval-only", "--start", str(trained))
    resumed = ("--output", str(trained.parent), "--name", trained.name, "--resume")
    for flags, expected in (
        ((*whole, "--eval-only", "--recipe", "study"), "has a configuration of its own; leave RECIPE"),
        ((*run, "--recipe", "study"), f"{trained}: has a configuration of its own; leave RECIPE"),
        ((*run, "--backbone", "resnet18"), f"{trained}: has a configuration of its own; leave RECIPE"),
        (("--start", str(coco_file)), "MODEL.META_ARCHITECTURE is YOLOv3, expected FasterRCNN"),
        (("--model", "yolov3", "--start", str(trained)), f"{trained}: MODEL.META_ARCHITECTURE is FasterRCNN, expected"),
        (("--model", "yolov3", *resumed), f"{trained}: MODEL.META_ARCHITECTURE is FasterRCNN, expected YOLOv3"),
        ((*whole, "--backbone", "resnet18"), "is a whole detector; leave BACKBONE=resnet18 out"),
        (("--start", "imagenet", "--pretrained", "0"), "START=imagenet and PRETRAINED=0: expected one of them"),
        (("--eval-only", "--start", str(coco_file)), "MODEL.META_ARCHITECTURE is YOLOv3, expected FasterRCNN"),
        (("--eval-only", "--start", "nowhere.weights"), "nowhere.weights: no such file"),
        (("--eval-only", "--start", "random"), "random: is no trained detector; expected a run folder"),
        (("--config", str(own), "--start", "imagenet"), "START=imagenet: the configuration names no weights"),
        (("--eval-only", "--start", "imagenet"), "imagenet: is no trained detector; expected a run folder"),
    ):
        assert_one_line(detector.later("contradictions", "--data", str(detector.data), *flags), expected)
