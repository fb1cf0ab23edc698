"""What both stages predict, the forward hook on the proposal generator, and the recall of what it records."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detection.config import CONFIGS, get_cfg
from detection.modeling import build_model
from detection.proposals import RECALL_AT, proposal_recall, record_proposals, to_original
from tests.processes import free_port


@pytest.fixture(scope="module")
def cfg(tiny_opts: list[str]) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / "Base-FasterRCNN.yaml"))
    cfg.merge_from_list(tiny_opts)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PRECISION = "float32"
    return cfg


@pytest.fixture(scope="module")
def model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg).eval()


def images(*sizes: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator),
            "height": 2 * h,
            "width": 2 * w,
        }
        for h, w in sizes or ((64, 96), (80, 64))
    ]


def test_logits_and_deltas_are_float32_under_autocast(model: nn.Module) -> None:
    """Of both stages: bfloat16 would tie many scores."""
    rpn, predictor = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, deltas = rpn([torch.rand(1, rpn.conv.in_channels, 4, 4)])
        assert rpn.conv(torch.rand(1, rpn.conv.in_channels, 4, 4)).dtype == torch.bfloat16
        found = predictor(torch.rand(2, predictor.cls_score.in_features))
    assert [each.dtype for each in (*logits, *deltas, *found)] == [torch.float32] * 4


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_records_what_the_first_stage_proposes(model: nn.Module) -> None:
    """The same as its stages called image by image, in the order of the images, however those run together."""
    sizes = [(64, 96), (80, 64), (60, 90), (96, 40), (33, 65)]  # the third and the last are padded to the first's size
    batch = images(*sizes)
    with torch.no_grad(), record_proposals(model) as recorded:
        model(batch)
    assert [proposals.image_size for proposals in recorded] == sizes
    for proposals, image in zip(recorded, batch, strict=True):
        with torch.no_grad():
            inputs = model.preprocess_image([image])
            (other,), _ = model.proposal_generator(inputs, model.backbone(inputs.tensor))
        assert proposals.objectness_logits.diff().le(0).all()  # best first
        assert len(proposals) > 0
        torch.testing.assert_close(proposals.proposal_boxes.tensor, other.proposal_boxes.tensor, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(proposals.objectness_logits, other.objectness_logits, rtol=1e-4, atol=1e-5)


def test_leaves_nothing_behind(model: nn.Module) -> None:
    batch = images()
    with torch.no_grad():
        before = model(batch)
        count = hooks(model)
        with record_proposals(model) as recorded:
            assert hooks(model) > count
            during = model(batch)
            model(batch[:1])
        assert hooks(model) == count
        with pytest.raises(ZeroDivisionError), record_proposals(model):
            raise ZeroDivisionError
        assert hooks(model) == count
        model(batch)
    assert len(recorded) == 3  # two images, then one, and none after the block
    for plain, hooked in zip(before, during, strict=True):
        assert torch.equal(plain["instances"].pred_boxes.tensor, hooked["instances"].pred_boxes.tensor)
        assert torch.equal(plain["instances"].scores, hooked["instances"].scores)


def test_does_not_hold_the_graph(cfg: CfgNode) -> None:
    model = build_model(cfg)
    with record_proposals(model.eval()) as recorded:
        model(images())
    assert not recorded[0].proposal_boxes.tensor.requires_grad
    assert not recorded[0].objectness_logits.requires_grad
    recorded[0].proposal_boxes.tensor.zero_()  # its own memory


def test_works_under_distributed_data_parallel(model: nn.Module) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model).eval()
        with torch.no_grad(), record_proposals(wrapped) as recorded, record_proposals(model) as inside:
            wrapped(images())
    finally:
        dist.destroy_process_group()
    assert len(recorded) == len(inside) == 2
    for first, second in zip(recorded, inside, strict=True):
        assert torch.equal(first.proposal_boxes.tensor, second.proposal_boxes.tensor)


def test_a_model_without_proposals_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no proposal generator"), record_proposals(nn.Linear(1, 1)):
        pass


def test_original_coordinates_by_hand() -> None:
    proposals = Instances((100, 50))
    proposals.proposal_boxes = Boxes(torch.tensor([[10.0, 20, 30, 60], [-5, -5, 60, 120]]))
    proposals.objectness_logits = torch.tensor([math.log(3), 0.0])
    scaled = to_original(proposals, height=200, width=150)  # twice as high, three times as wide
    assert scaled.image_size == (200, 150)
    assert scaled.proposal_boxes.tensor.tolist() == [[30, 40, 90, 120], [0, 0, 150, 200]]
    assert scaled.scores.tolist() == pytest.approx([0.75, 0.5])
    assert proposals.proposal_boxes.tensor[0].tolist() == [10, 20, 30, 60]  # untouched


def test_recall_by_hand() -> None:
    far = [[500.0, 500, 510, 510]]
    first = far * 9 + [[0, 0, 10, 10]] + far * 20 + [[20, 0, 30, 10.0]]  # finds at ranks 10 and 31
    second = far * 400 + [[0, 0, 10, 5.0]]  # half of the object, at rank 401
    proposals = [
        Boxes(torch.tensor(first)),
        Boxes(torch.tensor(second)),
        Boxes(torch.tensor(far)),
        Boxes(torch.zeros(0, 4)),
    ]
    ground_truth = [
        Boxes(torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10]])),
        Boxes(torch.tensor([[0.0, 0, 10, 10]])),
        Boxes(torch.zeros(0, 4)),
        Boxes(torch.tensor([[0.0, 0, 10, 10]])),
    ]
    assert RECALL_AT == (10, 30, 100, 300, 1000)
    assert proposal_recall(proposals, ground_truth) == {10: 0.25, 30: 0.25, 100: 0.5, 300: 0.5, 1000: 0.75}
    assert proposal_recall(proposals, ground_truth, threshold=0.51)[1000] == 0.5


def test_recall_without_objects() -> None:
    assert all(math.isnan(value) for value in proposal_recall([], []).values())
    nothing = [Boxes(torch.zeros(0, 4))]
    assert all(math.isnan(value) for value in proposal_recall(nothing, nothing).values())
