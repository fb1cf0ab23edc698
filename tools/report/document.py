"""A document: sections of typed blocks, and the two templates that make HTML and Markdown of them.

A paragraph is a plain string; a list holds blocks that stand side by side where there is room.
"""

import base64
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import ClassVar, NamedTuple, Union

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.run_folder import write_atomically

NONE = "–"  # noqa: RUF001
LONG = 16  # characters of a cell that may wrap
MIME = {"svg": "image/svg+xml", "webp": "image/webp"}

Block = Union[str, "Table", "Picture", "Listing", "Commands", list["Block"]]


class Section(NamedTuple):
    """An anchor, a heading and blocks."""

    id: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Table:
    """A table: fractions are shown with `digits` decimals; `strong` are the positions of rows that stand out."""

    frame: pd.DataFrame
    caption: str = ""
    digits: int = 2
    strong: Sequence[int] = ()
    kind: ClassVar[str] = "table"

    @property
    def cells(self) -> pd.DataFrame:
        """Everything as it is printed."""
        return self.frame.map(lambda value: figure(value, self.digits))

    @property
    def align(self) -> list[str]:
        """How each column is set: "number", "long" where its cells may wrap, else "short"."""
        columns = [[cell for cell in cells if cell not in ("", NONE)] for _, cells in self.cells.items()]
        return [
            "number" if cells and all(re.fullmatch(r"[\d.]+( %)?", cell) for cell in cells)
            else "long" if any(len(cell) > LONG for cell in cells) else "short"
            for cells in columns
        ]  # fmt: skip


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
class Commands:
    """What is to be made, each with the command that makes it."""

    commands: Sequence[tuple[str, str]]
    kind: ClassVar[str] = "commands"


def figure(value: object, digits: int = 2) -> str:
    """A value as text: a fraction with so many decimals, a dash for nan and None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_document(out: Path, sections: Sequence[Section], **facts: object) -> None:
    """Writes `index.html`, which needs nothing else, and `report.md` with its pictures in `figures/`.

    Args:
        out: the folder; made if missing.
        sections: what to say.
        facts: what the templates say around the sections.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for block in [block for section in sections for block in section.blocks]:
        for picture in block if isinstance(block, list) else [block]:
            if isinstance(picture, Picture):
                (out / "figures" / picture.name).write_bytes(picture.content)
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=templates,
        autoescape=lambda name: name is not None and "html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "cell": _cell}
    for name in ("index.html", "report.md"):
        text = environment.get_template(f"{name}.jinja").render(sections=sections, **facts)
        write_atomically(out / name, methodcaller("write", text.encode()))


def _breakable(text: str) -> Markup:
    """Text that may wrap where paths and names of classes have their joints."""
    return Markup(re.sub(r"([_/])(?=\w)", r"\1<wbr>", str(escape(text))))


def _cell(text: str) -> str:
    """Text in Markdown, where a bar would end the cell of a table and an angle bracket begin a tag."""
    return re.sub(r"([|*_])", r"\\\1", str(escape(text))).replace("\n", " ")
