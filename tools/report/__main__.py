"""Makes the report of all runs: `python -m tools.report --runs output --out report`."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

<<<<<<< HEAD
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.errors import exits_on_user_error
from common.run_folder import write_atomically
from tools.report.document import Document, Picture, compose, made_on
from tools.report.gather import gather

MIME = {".svg": "image/svg+xml", ".webp": "image/webp"}


def write_report(document: Document, out: Path, date: str) -> None:
    """Writes `index.html`, which needs nothing else, and `report.md` with its pictures in `figures/`.

    Args:
        document: what to say.
        out: the folder; made if missing.
        date: when it was made.
    """
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in pictures(document):
        (figures / picture.name).write_bytes(picture.content)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and "html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _data_uri
    environment.filters["breakable"] = _breakable
    environment.filters["cell"] = _cell
    for template, name in (("report.html.jinja", "index.html"), ("report.md.jinja", "report.md")):
        text = environment.get_template(template).render(document=document, date=date)
        write_atomically(out / name, lambda file, text=text: file.write(text.encode()))


def pictures(document: Document) -> Iterator[Picture]:
    """All pictures, in their order."""
    for section in document.sections:
        for block in section.blocks:
            inner = block.blocks if block.kind == "side" else [block]
            yield from (item for item in inner if item.kind == "picture")


def _data_uri(picture: Picture) -> str:
    content = base64.b64encode(picture.content).decode()
    return f"data:{MIME[Path(picture.name).suffix]};base64,{content}"


def _breakable(text: str) -> Markup:
    """Text that may wrap where paths and names of classes have their joints."""
    return Markup(re.sub(r"([_/])(?=\w)", r"\1<wbr>", str(escape(text))))


def _cell(text: str) -> str:
    """Text in Markdown, where a bar would end the cell of a table and an angle bracket begin a tag."""
    return str(escape(text)).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")
=======
from common.errors import exits_on_user_error
from tools.report.document import write_document
from tools.report.findings import Findings
from tools.report.sections import compose
>>>>>>> report


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
