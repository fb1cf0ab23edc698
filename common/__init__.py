"""What both halves and the command lines share."""

import logging
import warnings

from common.threads import settle_threads

settle_threads()

# What torch has deprecated: Detectron2 uses two, and the third has a new name that older versions of torch lack.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid.*", category=UserWarning)
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
