"""Render an HTML report as one file with its style and its pictures. Every value in the report is escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that is embedded in the page."""

    url: str
    """Data URL of a PNG file; see `embed_png`."""
    text: str
    """Alternative text for readers who cannot see the picture."""
    caption: str = ""
    """Caption above the picture."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A table cell with its own alignment or colour."""

    text: str
    """Text that the cell shows."""
    is_number: bool = False
    """Align the text to the right, for numbers with a unit."""
    colour: str = ""
    """Show the text as a badge of this CSS colour."""


@dataclass(kw_only=True)
class Table:
    """A table; a column that holds only numbers is aligned to the right."""

    head: Sequence[str]
    """Names of the columns."""
    rows: Sequence[Sequence[Any]]
    """Rows of the table. Each value is a text, an int, a float, a `Cell`, or None for an empty cell."""
    total: Sequence[Any] | None = None
    """Last row of the table, drawn below a line, with totals."""
    limit: int = 40
    """At most this many rows are shown. A note below the table gives the number of hidden rows."""

    @property
    def shown(self) -> list[list[Cell]]:
        """Cells of the rows that are shown."""
        return [[to_cell(value) for value in row] for row in self.rows[: self.limit]]

    @property
    def total_cells(self) -> list[Cell]:
        """Cells of the row with totals; empty if the table has no totals."""
        return [to_cell(value) for value in self.total or ()]

    @property
    def n_hidden(self) -> int:
        """Number of rows that are not shown."""
        return max(0, len(self.rows) - self.limit)

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds only numbers and empty cells."""
        columns = zip(*self.shown, strict=True) if self.rows else [()] * len(self.head)
        return [
            any(cell.is_number for cell in column) and all(cell.is_number or not cell.text for cell in column)
            for column in columns
        ]


def to_cell(value: Any) -> Cell:
    """Format a value for a table: integers with thousands separators, floats with four significant digits."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(text="")
    if isinstance(value, int) and not isinstance(value, bool):
        return Cell(text=f"{value:,}", is_number=True)
    if isinstance(value, float):
        return Cell(text=f"{value:,.4g}", is_number=True)
    return Cell(text=str(value))


def embed_png(data: bytes) -> str:
    """Return the data URL of a PNG file, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def make_anchor(title: str) -> str:
    """Return the HTML id of the section with this title."""
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def render_page(template: Path, **values: Any) -> str:
    """Render a report's template, which extends ``base.html.j2``.

    Parameters
    ----------
    template : Path
        The report's template file.
    **values
        Variables of the template. Every value is escaped; a variable that is not given is an error.

    Returns
    -------
    str
        The HTML page, which needs no other file.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
        keep_trailing_newline=True,
    )
    environment.filters["anchor"] = make_anchor
    # `headings` is empty at first. The template appends the title of each section to this list, and then makes the
    # navigation bar from the list.
    return environment.get_template(template.name).render(headings=[], **values)
