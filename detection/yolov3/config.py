"""Config keys of YOLOv3."""

from detectron2.config import CfgNode


def add_yolov3_config(cfg: CfgNode) -> None:
    """Adds `MODEL.YOLOV3` to `cfg`, in place.

    The names are those of `MODEL.RETINANET` where the meaning is the same. Every list with one entry a level stands in
    the order of `MODEL.YOLOV3.IN_FEATURES`, from the finest level to the coarsest.
    """
    cfg.MODEL.YOLOV3 = CfgNode()
    cfg.MODEL.YOLOV3.NUM_CLASSES = 20
    cfg.MODEL.YOLOV3.IN_FEATURES = ["dark3", "dark4", "dark5"]
    # Width and height in pixels of the anchors of each level (Redmon and Farhadi, 2018, section 2.3).
    cfg.MODEL.YOLOV3.ANCHORS = [
        [[10, 13], [16, 30], [33, 23]],
        [[30, 61], [62, 45], [59, 119]],
        [[116, 90], [156, 198], [373, 326]],
    ]
    # Channels of each level's neck, and how many alternating 1x1 and 3x3 convolutions it has.
    cfg.MODEL.YOLOV3.CONV_DIMS = [128, 256, 512]
    cfg.MODEL.YOLOV3.NUM_CONVS = [5, 5, 5]
    cfg.MODEL.YOLOV3.NORM = "BN"  # or "SyncBN"
    cfg.MODEL.YOLOV3.NORM_EPS = 1e-5  # 1e-6 in Darknet's own networks
    cfg.MODEL.YOLOV3.PRIOR_PROB = 0.01

    # A prediction whose box overlaps an object by more than this is no background example.
    cfg.MODEL.YOLOV3.IGNORE_THRESH = 0.7
    # "l1": cross-entropy on the centre and L1 on the log size; or "giou", "ciou" on the decoded box.
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_TYPE = "l1"
    cfg.MODEL.YOLOV3.BBOX_REG_LOSS_WEIGHT = 1.0
    # Focal objectness: gamma 0 and alpha -1 are plain cross-entropy.
    cfg.MODEL.YOLOV3.FOCAL_LOSS_GAMMA = 0.0
    cfg.MODEL.YOLOV3.FOCAL_LOSS_ALPHA = -1.0
    cfg.MODEL.YOLOV3.LABEL_SMOOTHING = 0.0

    cfg.MODEL.YOLOV3.SCORE_THRESH_TEST = 0.01
    cfg.MODEL.YOLOV3.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.YOLOV3.NMS_THRESH_TEST = 0.45
