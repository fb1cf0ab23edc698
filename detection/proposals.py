"""The region proposal network's proposals, recorded by a forward hook on the way to the final detections."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from detection.meta_arch import DetectorMixin

RECALL_AT = (10, 30, 100, 300, 1000)


@contextmanager
def record_proposals(model: nn.Module) -> Iterator[list[Instances]]:
    """Records the proposals of every forward pass inside the block.

    The model is not changed: a forward hook on its proposal generator, and one on itself that puts the proposals in the
    order of its inputs, are registered at the start of the block and removed at its end; test-time augmentation, whose
    views would each have proposals of their own, rests meanwhile. A model in `DistributedDataParallel` works too.

    Args:
        model: a two-stage detector of Detectron2.

    Yields:
        A list that fills as the model runs, one `Instances` an image in the order of the inputs, detached, on the
        model's device. `proposal_boxes` are XYXY in pixels of the resized image that the model saw, best first;
        `objectness_logits` are before the sigmoid. See `to_original`.

    Raises:
        ValueError: the model has no proposal generator.
    """
    bare_model = getattr(model, "module", model)
    generator = getattr(bare_model, "proposal_generator", None)
    if generator is None:
        raise ValueError(f"{type(model).__name__} has no proposal generator; expected a two-stage detector")
    recorded: list[Instances] = []
    of_this_pass: list[Instances] = []

    def keep(module: nn.Module, inputs: tuple, output: tuple[list[Instances], dict]) -> None:
        for proposals in output[0]:
            detached = Instances(proposals.image_size)
            detached.proposal_boxes = Boxes(proposals.proposal_boxes.tensor.detach().clone())
            detached.objectness_logits = proposals.objectness_logits.detach().clone()
            of_this_pass.append(detached)

    def put_in_order(module: nn.Module, inputs: tuple, output: object) -> None:
        (batch,) = inputs
        groups = bare_model.groups(batch) if isinstance(bare_model, DetectorMixin) else [range(len(batch))]
        indices = [index for group in groups for index in group]
        by_index = dict(zip(indices, of_this_pass, strict=True))
        recorded.extend(by_index[index] for index in range(len(indices)))
        of_this_pass.clear()

    augmentation = getattr(bare_model, "test_augmentation", None)
    if augmentation is not None:
        bare_model.test_augmentation = None
    handles = generator.register_forward_hook(keep), bare_model.register_forward_hook(put_in_order)
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
        if augmentation is not None:
            bare_model.test_augmentation = augmentation


def to_original(proposals: Instances, height: int, width: int) -> Instances:
    """Proposals in pixels of the original image of this size, clipped to it; objectness as `scores` from 0 to 1."""
    resized_height, resized_width = proposals.image_size
    scaled = Instances((height, width))
    scaled.proposal_boxes = Boxes(proposals.proposal_boxes.tensor.clone())
    scaled.proposal_boxes.scale(width / resized_width, height / resized_height)
    scaled.proposal_boxes.clip((height, width))
    scaled.scores = proposals.objectness_logits.sigmoid()
    return scaled


def proposal_recall(
    proposals: Sequence[Boxes], ground_truth: Sequence[Boxes], threshold: float = 0.5
) -> dict[int, float]:
    """Share of ground-truth boxes that one of the first k proposals of their image overlaps, for each k of `RECALL_AT`.

    Args:
        proposals: for each image, boxes with the best first.
        ground_truth: for each image, its boxes; an image may have none.
        threshold: intersection over union from which a box counts as found.

    Returns:
        k -> recall from 0 to 1; nan if there is no ground truth at all.
    """
    # For each ground-truth box, the rank of the first proposal that finds it.
    first_hits = []
    for boxes, targets in zip(proposals, ground_truth, strict=True):
        hits = pairwise_iou(targets, boxes) >= threshold
        first = torch.where(hits.any(dim=1), hits.float().argmax(dim=1) if len(boxes) else 0, torch.inf)
        first_hits.append(first.cpu().numpy())
    ranks = np.concatenate([np.empty(0), *first_hits])
    return {k: float((ranks < k).mean()) if len(ranks) else float("nan") for k in RECALL_AT}
