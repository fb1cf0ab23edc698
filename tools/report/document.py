"""A document: sections of typed blocks, and what makes a page, Markdown and a PDF of them.

A paragraph is a plain string, `code` in it between backticks; a list holds blocks that stand side by side where there
is room. Numbers and dates look the same everywhere: `figure` and `DATE` say how.
"""

import base64
import math
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Union

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.errors import UserError
from common.files import write_text

NONE = "–"  # noqa: RUF001
DATE = "%Y-%m-%d %H:%M"
NUMBER = r"[-+]?[\d.,]+( ± [\d.,]+)?( %)?( \(\d+ runs\))?"
LONG = 16  # characters of a cell that may wrap
MIME = {"svg": "image/svg+xml", "webp": "image/webp"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

Block = Union[str, "Table", "Picture", "Listing", list["Block"]]


class Section(NamedTuple):
    """An anchor, a heading, a line for those who see such a section for the first time, and blocks."""

    id: str
    title: str
    explanation: str
    blocks: list[Block]


class Missing(NamedTuple):
    """What a document lacks, and the command that would make it."""

    what: str
    command: str


class Document(NamedTuple):
    """A title, the paragraphs below it, what is left out and why, and the sections."""

    title: str
    lead: list[str]
    problems: list[str]
    sections: list[Section]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        frame: what stands in it; its index does not.
        caption: what it is of.
        digits: decimals of its fractions.
        strong: positions of the rows that stand out.
        differences: columns whose numbers get their sign, and a colour by it.
    """

    frame: pd.DataFrame
    caption: str = ""
    digits: int = 2
    strong: Sequence[int] = ()
    differences: Collection[str] = ()
    kind: ClassVar[str] = "table"

    @property
    def cells(self) -> pd.DataFrame:
        """Everything as it is printed."""
        return self.frame.apply(
            lambda column: column.map(lambda value: figure(value, self.digits, column.name in self.differences))
        )

    @property
    def kinds(self) -> list[str]:
        """What each column holds: a "number", a "difference", "long" text that may wrap, or "short" text."""
        kinds = []
        for name, column in self.cells.items():
            cells = [cell for cell in column if cell not in ("", NONE)]
            is_number = bool(cells) and all(re.fullmatch(NUMBER, cell) for cell in cells)
            is_long = any(len(cell) > LONG for cell in cells)
            kinds.append(
                "difference" if name in self.differences else "number" if is_number else "long" if is_long else "short"
            )
        return kinds


@dataclass(frozen=True)
class Picture:
    """A picture: name of its file, its bytes and what is to be seen on it."""

    name: str
    content: bytes
    caption: str
    kind: ClassVar[str] = "picture"

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        return f"data:{MIME[self.name.rpartition('.')[2]]};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Listing:
    """A text file to be unfolded."""

    title: str
    text: str
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample: divided by n - 1) of a figure over n runs, 2 or more."""

    mean: float
    deviation: float
    number: int


def spread(values: Sequence[Any]) -> Any:
    """Of several numbers their `Spread`, without nan; of one this number itself, of none None."""
    values = [value for value in values if not isinstance(value, float) or not math.isnan(value)] or values[:1]
    if len(values) < 2:
        return values[0] if values else None
    return Spread(statistics.mean(values), statistics.stdev(values), len(values))


def mean(value: Any) -> Any:
    """The mean of a `Spread`; any other value as it is."""
    return value.mean if isinstance(value, Spread) else value


def figure(value: object, digits: int = 2, is_difference: bool = False) -> str:
    """A value as text: numbers with so many decimals and commas between thousands, a dash for nan and None."""
    if isinstance(value, Spread):
        return f"{figure(float(value.mean), digits)} ± {figure(float(value.deviation), digits)}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if isinstance(value, float):
        sign = "+" if is_difference and round(value, digits) else ""
        return f"{value:{sign}z,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """A time as text, in two units at most."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def write_document(document: Document, out: Path) -> None:
    """Writes `index.html`, which needs nothing else, and `report.md` with its pictures in `figures/`; makes `out`."""
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for picture in _pictures([block for section in document.sections for block in section.blocks]):
        (out / "figures" / picture.name).write_bytes(picture.content)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = _inline
    page = environment.get_template("page.html.jinja").render(document=document)
    for name, text in (("index.html", page), ("report.md", _markdown(document))):
        write_text(out / name, text)


def print_pdf(page: Path, pdf: Path) -> None:
    """Prints a page on paper, with the browser that is installed.

    Raises:
        UserError: there is none, or it fails.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"{pdf}: no browser to print it; expected one of {', '.join(BROWSERS)}: install one")
    # Containers have no sandbox; the page is our own and has no scripts.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *options, f"--user-data-dir={profile}", f"--print-to-pdf={pdf.resolve()}"]
        try:
            subprocess.run([*command, page.resolve().as_uri()], capture_output=True, check=True, timeout=120)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"{pdf}: {browser} could not print {page}: {error}; print it by hand") from None


def _pictures(blocks: Sequence[Block]) -> Iterator[Picture]:
    for block in blocks:
        yield from _pictures(block) if isinstance(block, list) else [block] if isinstance(block, Picture) else []


def _inline(text: str) -> Markup:
    """Text as HTML: code where it stands between backticks, and joints of paths and names where a line may break."""
    parts = str(escape(text)).split("`")
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    parts[::2] = [re.sub(r"([_/])(?=\w)", r"\1<wbr>", part) for part in parts[::2]]
    return Markup("".join(parts))


def _escaped(text: str) -> str:
    """Text as Markdown, where a bar would end the cell of a table and an angle bracket begin a tag."""
    parts = text.replace("\n", " ").split("`")
    parts[::2] = [re.sub(r"([|*_])", r"\\\1", str(escape(part))) for part in parts[::2]]
    return "`".join(parts)


def _markdown(document: Document) -> str:
    blocks = [f"# {document.title}", *map(_escaped, document.lead)]
    if document.problems:
        blocks += ["Left out of this report:", "\n".join(f"- {_escaped(problem)}" for problem in document.problems)]
    for section in document.sections:
        blocks += [f"## {section.title}", _escaped(section.explanation), *map(_block_markdown, section.blocks)]
    return "\n\n".join(blocks) + "\n"


def _block_markdown(block: Block) -> str:
    match block:
        case Table():
            cells = block.cells.map(_escaped).rename(columns=_escaped)
            cells.iloc[list(block.strong)] = cells.iloc[list(block.strong)].map(lambda cell: cell and f"**{cell}**")
            align = ["right" if kind in ("number", "difference") else "left" for kind in block.kinds]
            table = cells.to_markdown(index=False, disable_numparse=True, colalign=align)
            return f"{table}\n\n{_escaped(block.caption)}".rstrip()
        case Picture():
            return f"![{_escaped(block.caption)}](figures/{block.name})\n\n{_escaped(block.caption)}"
        case Listing():
            summary = f"<details><summary>{_escaped(block.title)}</summary>"
            return f"{summary}\n\n```yaml\n{block.text.strip()}\n```\n\n</details>"
        case list():
            return "\n\n".join(map(_block_markdown, block))
    return _escaped(block)
