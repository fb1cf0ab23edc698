"""YOLOv3 for Detectron2; importing this package registers its backbones, anchor generator and meta-architecture."""

from detection.yolov3 import anchors, darknet, meta_arch
from detection.yolov3.config import add_yolov3_config

__all__ = ["add_yolov3_config", "anchors", "darknet", "meta_arch"]
