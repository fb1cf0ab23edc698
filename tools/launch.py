"""Starts a training or evaluation module in as many processes as asked for: `python -m tools.launch MODULE ...`."""

import sys

from common.errors import exits_on_user_error
from common.launch import launch


@exits_on_user_error
def main() -> None:
    """Runs the module named first on the command line with the arguments that follow."""
    launch(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
