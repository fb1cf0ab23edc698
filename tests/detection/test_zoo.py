"""Files as Detectron2's model zoo has them, into our configurations: stock Detectron2 says what they must compute."""

import pickle
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from detectron2.modeling import build_model as build_detectron2_model
from torch import nn

from common.errors import UserError
from common.weights import load_state
from common.zoo_pickle import read_zoo_pickle
from detection.config import CONFIGS, get_cfg, merge_file
from detection.modeling import build_model
from detection.zoo import convert_zoo, zoo_leaf

# Detectron2's own configurations, and ours for the same networks.
THEIRS = Path(detectron2.__file__).parent / "model_zoo" / "configs"
LEAVES = {
    "faster_rcnn_R_50_FPN_zoo": "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "faster_rcnn_R_101_FPN_zoo": "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    "faster_rcnn_R_50_C4_zoo": "COCO-Detection/faster_rcnn_R_50_C4_3x.yaml",
}
IMAGE = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1))  # RGB
FEW = ("MODEL.RPN.POST_NMS_TOPK_TEST", 15, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.02)


def ours(leaf: str) -> tuple[CfgNode, nn.Module]:
    cfg = get_cfg()
    merge_file(cfg, CONFIGS / f"{leaf}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.PRECISION", "float32", "MODEL.CHANNELS_LAST", False, *FEW])
    return cfg, build_model(cfg).eval()


@torch.no_grad()
def stock(config: str) -> nn.Module:
    """Detectron2's own network, which sees BGR, with random weights under which layers, boxes and classes count."""
    cfg = get_detectron2_cfg()
    cfg.merge_from_file(str(THEIRS / config))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *FEW])
    torch.manual_seed(0)
    model = build_detectron2_model(cfg).eval()
    for name, value in model.state_dict().items():
        if name.endswith("norm.weight"):
            # The last of a residual block is small, else a hundred layers would amplify what is rounded otherwise.
            value.uniform_(0.1, 0.3) if "conv3" in name else value.uniform_(0.5, 1.5)
        elif name.endswith(("norm.bias", "running_mean")):
            value.normal_(std=0.2)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    stem = next(module for name, module in model.named_modules() if name.endswith("stem.conv1"))
    stem.weight /= 60  # the zoo's deviation is 1
    predictor = model.roi_heads.box_predictor
    sizes: list[float] = []
    hook = predictor.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].norm(dim=1).mean().item()))
    model([{"image": IMAGE.flip(0)}])
    hook.remove()
    nn.init.normal_(predictor.cls_score.weight, std=2.5 / sizes[0])
    nn.init.normal_(predictor.bbox_pred.weight, std=0.5 / sizes[0])
    return model


def write_zoo_file(path: Path, model: nn.Module, **more: object) -> Path:
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    arrays |= {"pixel_mean": model.pixel_mean.numpy(), "pixel_std": model.pixel_std.numpy()}  # as in files of old
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo", **more}))
    return path


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_file_of_the_zoo_computes_what_it_does_in_detectron2(leaf: str, tmp_path: Path) -> None:
    theirs = stock(LEAVES[leaf])
    checkpoint = read_zoo_pickle(write_zoo_file(tmp_path / "model_final_0.pkl", theirs))
    assert zoo_leaf(checkpoint["model"]) == leaf
    _, model = ours(leaf)
    state, part = convert_zoo(checkpoint, model)
    assert part == ""
    load_state(model, state, "zoo")
    own = model.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(own[name], value.flip(1) if name.endswith("stem.conv1.weight") else value)

    with torch.no_grad():
        expected = theirs([{"image": IMAGE.flip(0)}])[0]["instances"]
        found, wrong = (model([{"image": image}])[0]["instances"] for image in (IMAGE, IMAGE.flip(0)))
    assert len(found) == len(expected) > 20
    assert found.pred_classes.tolist() == expected.pred_classes.tolist()
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=1e-4)
    assert len(wrong) != len(found) or not torch.allclose(wrong.scores, found.scores, atol=1e-3)


def test_a_tensor_more_or_less_is_refused(tmp_path: Path) -> None:
    leaf = "faster_rcnn_R_50_FPN_zoo"
    _, model = ours(leaf)
    checkpoint = {"model": dict(model.state_dict()), "__author__": "x", "matching_heuristics": False}
    del checkpoint["model"]["backbone.fpn_lateral2.bias"]
    with pytest.raises(UserError, match=r"1 tensors missing \(backbone.fpn_lateral2.bias"):
        load_state(model, convert_zoo(checkpoint, model)[0], "zoo")
    checkpoint["model"] = {**model.state_dict(), "roi_heads.mask_head.deconv.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"1 tensors unexpected \(roi_heads.mask_head.deconv.weight"):
        load_state(model, convert_zoo(checkpoint, model)[0], "zoo")


def caffe2_name(name: str) -> str:
    """A tensor of Detectron2's ResNet as Caffe2's files of MSRA's networks call it: `res2_0_branch2a_bn_s`."""
    branches = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    *place, layer, kind = name.replace(".norm.", "_bn.").split(".")
    layer, _, norm = layer.partition("_")
    stem = "res_conv1" if norm else "conv1"
    layer = stem if place == ["stem"] else "_".join([*place, branches[layer]])
    return f"{layer}_bn_{'s' if kind == 'weight' else 'b'}" if norm else f"{layer}_w"


@pytest.mark.parametrize("leaf", ["faster_rcnn_R_50_FPN_zoo", "faster_rcnn_R_50_C4_zoo"])
def test_a_backbone_of_msra(leaf: str, tmp_path: Path) -> None:
    """R-50.pkl: scale and shift are all that is left of BatchNorm, and the classifier is of no use here."""
    theirs = stock(LEAVES["faster_rcnn_R_50_FPN_zoo"]).backbone.bottom_up
    kept = {name: value for name, value in theirs.state_dict().items() if "running" not in name}
    blobs = {caffe2_name(name): value.numpy() for name, value in kept.items()}
    assert {"conv1_w", "res_conv1_bn_s", "res2_0_branch1_w", "res5_2_branch2c_bn_b"} <= blobs.keys()
    blobs |= {"pred_w": torch.zeros(1000, 2048).numpy(), "pred_b": torch.zeros(1000).numpy()}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blobs))

    checkpoint = read_zoo_pickle(tmp_path / "R-50.pkl")
    assert zoo_leaf(checkpoint["model"]) is None
    _, model = ours(leaf)
    state, part = convert_zoo(checkpoint, model)
    load_state(model, state, "R-50.pkl", part)
    own = model.state_dict()
    for name, value in kept.items():
        places = (f"backbone.bottom_up.{name}", f"backbone.{name}", f"roi_heads.{name}")
        (place,) = (place for place in places if place in own)
        assert torch.equal(own[place], value.flip(1) if name == "stem.conv1.weight" else value)


def test_a_file_of_another_network_is_refused() -> None:
    _, model = ours("faster_rcnn_R_50_FPN_zoo")
    for author in ("Caffe2", "torchvision"):
        checkpoint = {"model": {"spam_w": torch.zeros(2)}, "__author__": author, "matching_heuristics": True}
        with pytest.raises(ValueError, match="none of their names fits"):
            convert_zoo(checkpoint, model)
