"""What a run says: on the terminal at once, and in the `log.txt` of its folder from the moment there is one."""

import logging
import logging.handlers
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from common.processes import is_main_process


class _Terminal(logging.Handler):
    """Writes above the progress bars; lines that a bar replaces (`extra={"is_progress": True}`) are left out then."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (getattr(record, "is_progress", False) and sys.stderr.isatty()):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class RunLog:
    """Shows the lines of some loggers in the main process, and only their errors in the others.

    Args:
        names: of the loggers, such as `detection`.
        quiet: loggers below them whose lines say what ours say; only their warnings are taken.
    """

    def __init__(self, *names: str, quiet: Sequence[str] = ()) -> None:
        self.loggers = [logging.getLogger(name) for name in names]
        # What is said before there is a run folder waits for its log.txt.
        self.before = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        terminal = _Terminal()
        terminal.setFormatter(logging.Formatter("%(message)s"))
        for logger in self.loggers:
            logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
            logger.propagate = False
            logger.handlers = [terminal, self.before] if is_main_process() else [terminal]
        for name in quiet:
            logging.getLogger(name).setLevel(logging.WARNING)

    def open(self, run: Path) -> None:
        """Goes on in `log.txt` of a run folder, with what was said before; called in the main process."""
        file = logging.FileHandler(run / "log.txt")
        file.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        for logger in self.loggers:
            logger.removeHandler(self.before)
            logger.addHandler(file)
        self.before.setTarget(file)
        self.before.close()
