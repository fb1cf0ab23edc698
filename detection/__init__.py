"""Object detection on Pascal VOC with Detectron2."""

import logging
import warnings

# Detectron2 uses what torch has deprecated; users of this project can do nothing about it.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
