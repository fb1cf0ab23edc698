"""Makes the report of all runs: `python -m tools.report --runs output --out report`."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from common.errors import exits_on_user_error
from tools.report.document import write_document
from tools.report.findings import Findings
from tools.report.sections import compose


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the report and says what is not in it.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    parser = argparse.ArgumentParser(prog="tools.report", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    args = parser.parse_args(argv)

    found = Findings(args.runs)
    sections = compose(found)
    problems = sorted(found.problems)
    # The date is the only line that differs from one making to the next.
    date = f"{datetime.datetime.now():%Y-%m-%d %H:%M}"
    write_document(args.out, sections, root=args.runs, date=date, problems=problems, missing=len(found.missing))
    for problem in problems:
        print(f"left out: {problem}")
    for part, command in found.missing:
        print(f"not there: {part}; to make it: {command}")
    number = len(sections) - bool(found.missing)  # the one of what is missing does not count
    print(f"{number} sections: {args.out / 'index.html'} and {args.out / 'report.md'}")


if __name__ == "__main__":
    main()
