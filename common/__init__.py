"""The ground floor: what both halves and the command lines stand on, each thing once."""

import logging
import warnings

from common.threads import settle_threads

settle_threads()

# Detectron2 uses what torch has deprecated; users of this project can do nothing about it.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid.*", category=UserWarning)
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
