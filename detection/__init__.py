"""Object detection on Pascal VOC with Detectron2."""
