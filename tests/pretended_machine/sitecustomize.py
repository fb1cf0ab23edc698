"""Gives every Python process pretended GPUs from its start, whatever it runs: PYTHONPATH=tests/pretended_machine:. ."""

import atexit
import os

from tests.pretended_gpu import pretended_gpu

_machine = pretended_gpu(int(os.environ.get("PRETENDED_GPUS", "1")))
_machine.__enter__()
atexit.register(_machine.__exit__, None, None, None)
