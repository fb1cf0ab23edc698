"""Errors that a user can cause, and how every command line of the project reports them."""

import functools
import os
import sys
import time
from collections.abc import Callable


class UserError(Exception):
    """Something the user can mend. One line: the file, what was found, what was expected, what to do."""


def exits_on_user_error(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command line's `main`: a `UserError` becomes one line on stderr and exit code 2.

    With `DEBUG=1` in the environment the traceback is shown instead. Among several processes rank 0 speaks first;
    another rank speaks only when it is still alive a little later, that is, when rank 0 did not fail as well.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("DEBUG") == "1":
                raise
            if os.environ.get("RANK", "0") != "0":
                time.sleep(3)
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
