"""Errors that a user can cause, and how every command line of the project reports them.

Needs the standard library alone: set-up imports it on a bare machine.
"""

import argparse
import functools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, ParamSpec

P = ParamSpec("P")


class UserError(Exception):
    """Something the user can mend. One line: the file, what was found, what was expected, what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """One for which what is wrong with a command line is a `UserError`: one line, without the usage of `--help`."""

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        raise UserError(message)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, answered by saving what can be saved first; the message says how to go on."""


def exits_on_user_error(main: Callable[P, None]) -> Callable[P, None]:
    """Wraps a command line's `main`: what a user can mend becomes one line on stderr and an exit code, no traceback.

    A `UserError`, an `OSError` (a full disk, a folder that cannot be written) and memory that is not there give exit
    code 2, Ctrl-C gives 130. With `DEBUG=1` in the environment the traceback is shown instead.

    Among several processes rank 0 reports at once. Other ranks, and any process with an unexpected error (often only
    the lost connection to the one that failed), wait a little first: the launcher ends them meanwhile if another one
    has failed. Only rank 0 reports an interrupt.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = os.environ.get("DEBUG") == "1"
        if not debug:
            # On a full disk TensorBoard's thread and the handler of log.txt would each print a traceback as well.
            logging.raiseExceptions = False
            threading.excepthook = _ignore_os_errors
        is_first = os.environ.get("RANK", "0") == "0"
        try:
            main(*args, **kwargs)
        except KeyboardInterrupt as stop:
            if debug:
                raise
            if is_first:
                print(f"interrupted{': ' if str(stop) else ''}{stop}", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            line = one_line(error)
            if debug or (line is None and "RANK" not in os.environ):
                raise
            if line is None or not is_first:
                time.sleep(3)  # the launcher ends this process meanwhile, if another has failed here
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return wrapped


def _ignore_os_errors(error: threading.ExceptHookArgs) -> None:
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _with_contexts(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def last_line(error: BaseException) -> str:
    """The last line of an error's message, cut short, or the name of its type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def one_line(error: Exception) -> str | None:
    """What to say of an error, in one line; None if it is none that a user can mend."""
    text = str(error).strip()
    if isinstance(error, UserError):
        # A worker of a DataLoader hands its error on with a traceback in front of the message.
        return text.splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    # A worker killed while it hands over a batch shows only as a broken connection. Otherwise torch raises in a signal
    # handler, at any point, and what that interrupts, such as a checkpoint, may fail in turn and hide the first error.
    frames = traceback.extract_tb(error.__traceback__)
    is_broken = isinstance(error, ConnectionError | EOFError) and any("torch/utils/data" in f.filename for f in frames)
    is_killed = any("DataLoader worker (pid" in str(cause) for cause in _with_contexts(error))
    if is_broken or is_killed or "unable to allocate shared memory" in text:
        return (
            "a loading process was killed or cannot hand over its batch, expected it to go on; often /dev/shm is too "
            "small (64 MB in a container: start it with --shm-size=2g or --ipc=host), or the memory: "
            "DATALOADER.NUM_WORKERS 0 of a detector or workers=0 of a classifier loads in the training process"
        )
    if isinstance(error, OSError):
        if error.filename is not None:
            return f"{error.filename}: {error.strerror}; check the path, its permissions and the space on its disk"
        return text.splitlines()[-1] if text else type(error).__name__
    # Matched by text: torch's CPU allocator, and CUDA where it knows no size, do not raise torch.OutOfMemoryError.
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        parts = [part.strip(" .") for part in re.split(r"\.\s|\n", text)]
        asked = next((part for part in parts if "llocate" in part), "nothing is left")
        return (
            f"out of memory ({asked}); lower the batch or the size of the images: SOLVER.IMS_PER_BATCH, "
            "INPUT.MIN_SIZE_TRAIN, INPUT.SQUARE_SIZES_TRAIN or TEST.IMS_PER_BATCH of a detector, batch_size or "
            "image_size of a classifier"
        )
    if "by peer" in text:
        return (
            "another process has ended, expected all to go on: see what it printed on its machine; RESUME=1 on all "
            "machines goes on from the last checkpoint"
        )
    return None
