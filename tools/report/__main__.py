"""Makes the report of all runs: `python -m tools.report --runs output --out report`."""

import datetime
from collections.abc import Sequence
from pathlib import Path

from common.errors import ArgumentParser, UserError, exits_on_user_error
from tools.report.document import DATE, Document, print_pdf, write_document
from tools.report.runs import Runs
from tools.report.sections import compose


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Makes the report and says what is not in it.

    Args:
        argv: the command line without the program's name; None takes that of the process.
    """
    parser = ArgumentParser(prog="tools.report", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("output"), help="folder of all runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--pdf", action="store_true", help="print the page as report.pdf, where a browser is installed")
    args = parser.parse_args(argv)

    runs = Runs(args.runs)
    sections, missing = compose(runs)
    problems = sorted(runs.problems)
    # The date is the only line that differs from one making to the next.
    lead = [f"All runs below {args.runs}. Made on {datetime.datetime.now():{DATE}}."]
    lead.append("Of birds, accuracies are in per cent; of boxes, recall and precision go from 0 to 1.")
    if missing:
        lead.append(f"Parts of the study that are not there: {len(missing)}; the last section names them.")
    write_document(Document("Birds and boxes: report", lead, problems, sections), args.out)
    for problem in problems:
        print(f"left out: {problem}")
    for what, command in missing:
        print(f"not there: {what}; to make it: {command}")
    number = len(sections) - bool(missing)  # the one of what is missing does not count
    print(f"{number} sections: {args.out / 'index.html'} and {args.out / 'report.md'}")
    if args.pdf:
        try:
            print_pdf(args.out / "index.html", args.out / "report.pdf")
            print(f"On paper: {args.out / 'report.pdf'}")
        except UserError as error:
            print(f"not printed: {error}")


if __name__ == "__main__":
    main()
