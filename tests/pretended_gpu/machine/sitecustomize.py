"""Gives every Python process pretended GPUs from its start, for command lines that start processes of their own.

`PYTHONPATH=tests/pretended_gpu/machine:. PRETENDED_GPUS=2 python ...`
"""

import atexit
import os

from tests.pretended_gpu import pretended_gpu

_machine = pretended_gpu(int(os.environ.get("PRETENDED_GPUS", "1")))
_machine.__enter__()
atexit.register(_machine.__exit__, None, None, None)
