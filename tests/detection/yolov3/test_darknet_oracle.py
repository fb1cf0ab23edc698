"""The network, its decoding and its non-maximum suppression against OpenCV's reading of Darknet's own files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import ImageList
from torch import nn

from detection.yolov3.darknet_weights import convolutions, read_darknet_weights, write_darknet_weights
from detection.yolov3.targets import Grid

DARKNET = ("MODEL.TIMM.NORM_EPS", 1e-6, "MODEL.TIMM.NEGATIVE_SLOPE", 0.1, "MODEL.YOLOV3.NORM_EPS", 1e-6)
ANCHORS = "10,13, 16,30, 33,23, 30,61, 62,45, 59,119, 116,90, 156,198, 373,326"


def convolutional(filters: int, size: int, stride: int = 1, activation: str = "leaky") -> str:
    norm = "batch_normalize=1\n" if activation == "leaky" else ""
    return f"[convolutional]\n{norm}filters={filters}\nsize={size}\nstride={stride}\npad=1\nactivation={activation}\n\n"


def darknet53_cfg() -> str:
    """Darknet's cfg of YOLOv3 for 20 classes, written down from the paper's table 1 and figure of the pyramid."""
    text = "[net]\nwidth=416\nheight=416\nchannels=3\n\n" + convolutional(32, 3)
    for filters, blocks in zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), strict=True):
        text += convolutional(filters, 3, stride=2)
        text += (
            convolutional(filters // 2, 1) + convolutional(filters, 3) + "[shortcut]\nfrom=-3\nactivation=linear\n\n"
        ) * blocks
    for dim, mask, skip in ((512, "6,7,8", 61), (256, "3,4,5", 36), (128, "0,1,2", None)):
        text += (convolutional(dim, 1) + convolutional(2 * dim, 3)) * 3 + convolutional(75, 1, activation="linear")
        text += f"[yolo]\nmask={mask}\nanchors={ANCHORS}\nclasses=20\nnum=9\n\n"
        if skip:
            text += "[route]\nlayers=-4\n\n" + convolutional(dim // 2, 1) + "[upsample]\nstride=2\n\n"
            text += f"[route]\nlayers=-1,{skip}\n\n"
    return text


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random weights, with the BatchNorm statistics that keep activations of a noise image in bounds."""
    for conv, norm in convolutions(model):
        nn.init.kaiming_normal_(conv.weight)
        if norm is None:
            nn.init.normal_(conv.bias)
        else:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0
    for level in model.head.levels:
        nn.init.normal_(level.prediction.weight, std=0.005)
    model.train()
    model.head(list(model.backbone(torch.rand(2, 3, 128, 128)).values()))
    model.eval()


@pytest.fixture(scope="module")
def model(build) -> nn.Module:
    model = build("Base-YOLOv3", *DARKNET)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("darknet") / "random.weights"
    write_darknet_weights(path, model)
    return path


@pytest.fixture(scope="module")
def written_cfg(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("darknet") / "yolov3.cfg"
    path.write_text(darknet53_cfg())
    return path


def raw_outputs(cfg: Path, weights: Path, images: np.ndarray) -> list[np.ndarray]:
    """OpenCV's output of the convolution before each [yolo] layer, finest level first."""
    net = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    net.setInput(images)
    names = [f"conv_{int(name.split('_')[1]) - 1}" for name in net.getUnconnectedOutLayersNames()]
    outputs = net.forward(sorted(names, key=lambda name: int(name.split("_")[1]), reverse=True))
    return [np.asarray(output) for output in outputs]


def assert_same_outputs(model: nn.Module, cfg: Path, weights: Path, size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    features = model.backbone(images)
    with torch.no_grad():
        ours = model.head([features[name] for name in model.head_in_features])
    theirs = raw_outputs(cfg, weights, images.numpy())
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert their.std() > 0.1
        assert np.abs(our.numpy() - their).max() <= 1e-4 * np.abs(their).max()


def test_random_weights_and_written_cfg(model, weights, written_cfg):
    assert_same_outputs(model, written_cfg, weights, (320, 416))


@pytest.mark.parametrize("size", [320, 416, 608])
def test_random_weights_and_official_cfg(model, weights, shared, size):
    assert_same_outputs(model, shared / "weights" / "yolov3-voc.cfg", weights, (size, size))


def test_decoding(model, weights, written_cfg):
    """OpenCV's [yolo] layers give centre and size relative to the image, objectness, and scores of the classes."""
    images = torch.rand(1, 3, 416, 416, generator=torch.Generator().manual_seed(2))
    net = cv2.dnn.readNetFromDarknet(str(written_cfg), str(weights))
    net.setInput(images.numpy())
    names = sorted(net.getUnconnectedOutLayersNames(), key=lambda name: int(name.split("_")[1]), reverse=True)
    theirs = np.concatenate(net.forward(names))

    features = list(model.backbone(images).values())
    with torch.no_grad():
        predictions = torch.cat([permute_to_N_HWA_K(level, 25) for level in model.head(features)], dim=1)[0]
    grid = Grid.of(model.anchor_generator, features)
    deltas = torch.cat([predictions[:, :2].sigmoid(), predictions[:, 2:4]], dim=1)
    boxes = model.box2box_transform.apply_deltas(deltas, grid.anchors, grid.anchor_strides).numpy() / 416
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, theirs[:, :2], atol=1e-5)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], theirs[:, 2:4], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(predictions[:, 4].sigmoid(), theirs[:, 4], atol=1e-4)
    scores = (predictions[:, 4:5].sigmoid() * predictions[:, 5:].sigmoid()).numpy()
    shown = theirs[:, 5:] > 0  # OpenCV sets low scores to 0
    assert shown.mean() > 0.1
    np.testing.assert_allclose(scores[shown], theirs[:, 5:][shown], atol=1e-4)


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def decode_plainly(outputs: list[np.ndarray], size: tuple[int, int], thresh: float) -> list[tuple]:
    """Scores, classes and boxes of raw outputs of yolov3-tiny, one cell after the other, then greedy suppression."""
    anchors = {16: [(10, 14), (23, 27), (37, 58)], 32: [(81, 82), (135, 169), (344, 319)]}
    found = []
    for stride, output in zip((16, 32), outputs, strict=True):
        output = output[0].reshape(3, 85, *output.shape[2:]).astype(np.float64)
        for anchor, y, x in np.argwhere(sigmoid(output[:, 4]) > thresh):
            tx, ty, tw, th, objectness = output[anchor, :5, y, x]
            width, height = np.exp(tw) * anchors[stride][anchor][0], np.exp(th) * anchors[stride][anchor][1]
            centre_x, centre_y = (x + sigmoid(tx)) * stride, (y + sigmoid(ty)) * stride
            box = np.array([centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2])
            for index, logit in enumerate(output[anchor, 5:, y, x]):
                score = sigmoid(objectness) * sigmoid(logit)
                if score > thresh:
                    found.append((score, index, box))
    found.sort(key=lambda detection: -detection[0])
    kept: list[tuple] = []
    for score, index, box in found:
        if all(index != other[1] or intersection_over_union(box, other[2]) <= 0.45 for other in kept):
            kept.append((score, index, box))
    height, width = size
    return [(score, index, box.clip(0, (width, height, width, height))) for score, index, box in kept[:100]]


@pytest.mark.parametrize("photo", ["000000000071", "000000000599", "000000000641"])
def test_trained_tiny_network_on_photographs(build, shared, photo):
    model = build("yolov3_tiny", "MODEL.YOLOV3.SCORE_THRESH_TEST", 0.05)
    model.eval()
    weights = shared / "weights" / "yolov3-tiny.weights"
    read_darknet_weights(weights, model)
    image = cv2.cvtColor(cv2.imread(str(shared / "photos" / f"{photo}.jpg")), cv2.COLOR_BGR2RGB)
    scale = 416 / max(image.shape)
    image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    image = torch.from_numpy(image).permute(2, 0, 1)

    with torch.no_grad():
        found = model([{"image": image}])[0]["instances"]
    padded = ImageList.from_tensors([image / 255], 32).tensor
    outputs = raw_outputs(shared / "weights" / "yolov3-tiny.cfg", weights, padded.numpy())
    expected = decode_plainly(outputs, image.shape[1:], 0.05)
    assert len(found) == len(expected) > 0
    assert found.pred_classes.tolist() == [index for _, index, _ in expected]
    np.testing.assert_allclose(found.scores, [score for score, _, _ in expected], rtol=1e-3)
    np.testing.assert_allclose(found.pred_boxes.tensor, [box for _, _, box in expected], atol=0.05)
