"""YOLOv3 as a Detectron2 meta-architecture."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_anchor_generator, build_backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector, permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from detection.meta_arch import DetectorMixin
from detection.test_time_augmentation import TTA
from detection.yolov3.anchors import YOLOAnchorGenerator, YOLOBox2BoxTransform
from detection.yolov3.head import YOLOv3Head
from detection.yolov3.losses import YOLOv3Loss
from detection.yolov3.targets import Grid, assign_targets


@META_ARCH_REGISTRY.register()
class YOLOv3(DetectorMixin, DenseDetector):
    """Redmon and Farhadi, "YOLOv3: An Incremental Improvement", 2018.

    Decoding, targets and losses work in float32, whatever the precision of the network.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: YOLOAnchorGenerator,
        box2box_transform: YOLOBox2BoxTransform,
        loss: YOLOv3Loss,
        num_classes: int,
        ignore_thresh: float = 0.7,
        test_score_thresh: float = 0.01,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 100,
        pixel_mean: list[float],
        pixel_std: list[float],
        precision: str = "float32",
        test_augmentation: TTA | None = None,
    ):
        """Takes its parts built.

        Args:
            backbone: gives `head_in_features`.
            head: maps them to raw predictions (N, A * (5 + K), H, W) for each level.
            head_in_features: names of the backbone's features, finest first.
            anchor_generator: anchors of the same levels.
            box2box_transform: decodes boxes.
            loss: of predictions, grid and targets.
            num_classes: number of foreground classes K.
            ignore_thresh: a prediction that overlaps an object by more than this IoU is no background example.
            test_score_thresh: detections must score more; the score is objectness times class probability.
            test_topk_candidates: number of pairs of prediction and class that enter non-maximum suppression.
            test_nms_thresh: IoU above which the worse of two detections of one class is suppressed.
            max_detections_per_image: number of detections to return at most.
            pixel_mean: subtracted from each channel, red first.
            pixel_std: divides each channel.
            precision: of the network, see `common.runtime.autocast`.
            test_augmentation: how images are looked at in evaluation; None for once, as they are.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.precision = precision
        self.test_augmentation = test_augmentation
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.loss = loss
        self.num_classes = num_classes
        self.ignore_thresh = ignore_thresh
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self._grids: dict[tuple, Grid] = {}

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Reads `MODEL.YOLOV3` and `TEST.AUG`, and builds the backbone from `MODEL.BACKBONE`."""
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[name] for name in cfg.MODEL.YOLOV3.IN_FEATURES]
        transform = YOLOBox2BoxTransform()
        return {
            "backbone": backbone,
            "head": YOLOv3Head(cfg, shapes),
            "head_in_features": cfg.MODEL.YOLOV3.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": transform,
            "loss": YOLOv3Loss(
                transform=transform,
                box_reg_loss_type=cfg.MODEL.YOLOV3.BBOX_REG_LOSS_TYPE,
                box_reg_loss_weight=cfg.MODEL.YOLOV3.BBOX_REG_LOSS_WEIGHT,
                focal_loss_alpha=cfg.MODEL.YOLOV3.FOCAL_LOSS_ALPHA,
                focal_loss_gamma=cfg.MODEL.YOLOV3.FOCAL_LOSS_GAMMA,
                label_smoothing=cfg.MODEL.YOLOV3.LABEL_SMOOTHING,
            ),
            "num_classes": cfg.MODEL.YOLOV3.NUM_CLASSES,
            "ignore_thresh": cfg.MODEL.YOLOV3.IGNORE_THRESH,
            "test_score_thresh": cfg.MODEL.YOLOV3.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.YOLOV3.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.YOLOV3.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "precision": cfg.MODEL.PRECISION,
            "test_augmentation": TTA.from_config(cfg, cfg.MODEL.YOLOV3.NMS_THRESH_TEST),
        }

    def forward_training(
        self, images: ImageList, features: list[Tensor], predictions: list[Tensor], gt_instances: list[Instances]
    ) -> dict[str, Tensor]:
        """The losses by name."""
        with torch.autocast(self.device.type, enabled=False):
            grid = self._grid(features)
            flat = self._flatten(predictions)
            targets = assign_targets(flat[..., :4], grid, self.box2box_transform, gt_instances, self.ignore_thresh)
            return self.loss(flat, grid, targets)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[Tensor]
    ) -> list[Instances]:
        """The detections in each image, in pixels of the network's input."""
        with torch.autocast(self.device.type, enabled=False):
            grid = self._grid(features)
            return [
                self.inference_single_image(predictions_per_image, grid, image_size)
                for predictions_per_image, image_size in zip(
                    self._flatten(predictions), images.image_sizes, strict=True
                )
            ]

    def inference_single_image(self, predictions: Tensor, grid: Grid, image_size: tuple[int, int]) -> Instances:
        """Decodes the best of predictions (R, 5 + K) and suppresses duplicates, each class by itself.

        One prediction may be detected as several classes.
        """
        objectness = predictions[:, 4].sigmoid()
        candidates = (objectness > self.test_score_thresh).nonzero()[:, 0]  # no score exceeds its objectness
        scores = objectness[candidates, None] * predictions[candidates, 5:].sigmoid()
        above = scores > self.test_score_thresh
        rows, classes = above.nonzero(as_tuple=True)
        scores = scores[above]
        count = scores.shape[0]  # a tensor in a trace, where min would make a constant of it
        topk = self.test_topk_candidates
        scores, best = scores.topk(count.clamp(max=topk) if isinstance(count, Tensor) else min(count, topk))
        candidates, classes = candidates[rows[best]], classes[best]
        boxes = self.box2box_transform.decode(
            predictions[candidates, :4], grid.anchors[candidates], grid.anchor_strides[candidates]
        )
        keep = batched_nms(boxes, scores, classes, self.test_nms_thresh)[: self.max_detections_per_image]
        return Instances(image_size, pred_boxes=Boxes(boxes[keep]), scores=scores[keep], pred_classes=classes[keep])

    def _grid(self, features: list[Tensor]) -> Grid:
        """The grid for features of these sizes, made once; in a trace it is made each time, as part of the trace."""
        if torch.jit.is_tracing():
            return Grid.of(self.anchor_generator, features)
        key = (self.device, *(feature.shape[-2:] for feature in features))
        if key not in self._grids:
            with torch.inference_mode(False):  # training needs other tensors than evaluation
                self._grids[key] = Grid.of(self.anchor_generator, features)
        return self._grids[key]

    def _flatten(self, predictions: list[Tensor]) -> Tensor:
        """Predictions of all levels as one tensor (N, R, 5 + K) in float32."""
        return torch.cat([permute_to_N_HWA_K(level.float(), 5 + self.num_classes) for level in predictions], dim=1)
