"""A very narrow Faster R-CNN for images of 64 pixels, as options: shared by tests that train one in seconds."""

FASTER_RCNN = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
}
