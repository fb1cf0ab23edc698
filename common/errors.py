"""Errors that a user can cause, and how every command line of the project reports them."""

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. One line: the file, what was found, what was expected, what to do."""


def exits_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command line's `main`: a `UserError` becomes one line on stderr and exit code 2.

    So does an `OSError`: a full disk, a folder that cannot be written. With `DEBUG=1` in the environment the traceback
    is shown instead. Among several processes rank 0 speaks first; another rank speaks only when it is still alive a
    little later, that is, when rank 0 did not fail as well. So does a process with another kind of error, which may
    only be the connection that it lost to the one that failed.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        if os.environ.get("DEBUG") != "1":
            # On a full disk TensorBoard's thread and the handler of log.txt would each print a traceback as well.
            logging.raiseExceptions = False
            threading.excepthook = _ignore_os_errors
        try:
            main(*args, **kwargs)
        except (UserError, OSError) as error:
            if os.environ.get("DEBUG") == "1":
                raise
            if os.environ.get("RANK", "0") != "0":
                time.sleep(3)
            print(f"error: {_one_line(error)}", file=sys.stderr)
            sys.exit(2)
        except Exception as error:
            if "RANK" not in os.environ:
                raise
            time.sleep(3)  # the launcher ends this process meanwhile, if another has failed here
            if "by peer" not in str(error) or os.environ.get("DEBUG") == "1":
                raise
            print(
                "error: another process has ended, expected all to go on: see what it printed on its machine; RESUME=1 "
                "on all machines goes on from the last checkpoint",
                file=sys.stderr,
            )
            sys.exit(2)

    return wrapped


def _ignore_os_errors(error: threading.ExceptHookArgs) -> None:
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the space on its disk"
    # A worker of a DataLoader hands its error on with a traceback in front of the message.
    return str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
