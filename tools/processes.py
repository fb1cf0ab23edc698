"""Processes that others start."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Asks the kernel to kill this process when the one that started it is killed: nobody else would stop it then.

    Fit for `subprocess.Popen(preexec_fn=...)`. Linux alone knows how.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
