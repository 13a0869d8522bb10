"""The demo's report as one page that carries all its pictures in itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #22303c; background: #fafbfc; margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; } small, .soft { color: #66737f; }
.verdict { background: #fff; border-left: 6px solid #2a6f97; padding: 1rem 1.2rem; font-size: 1.1rem; }
.verdict.no { border-color: #d1495b; }
table { border-collapse: collapse; background: #fff; } .scroll { overflow-x: auto; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid #e3e8ec; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 600; font-size: .9rem; }
table.pictures td { padding: .25rem; border: 0; text-align: center; font-size: .85rem; }
table.pictures th { text-align: center; padding: .4rem .5rem; }
table.pictures img { width: 76px; height: 76px; image-rendering: pixelated; border-radius: 4px; display: block; }
table.pictures td.own { background: #e9f1f6; }
figure { margin: 0; } figure img { max-width: 100%; border-radius: 4px; }
code, pre { font: .85rem/1.5 ui-monospace, monospace; } pre { background: #fff; padding: .8rem 1rem; overflow-x: auto; }
ol li { margin: .3rem 0; max-width: 46rem; }
"""


def picture(path: Path, alternative: str) -> str:
    """Embed a PNG.

    Parameters
    ----------
    path : Path
        The file.
    alternative : str
        What it shows.

    Returns
    -------
    str
        HTML.
    """
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alternative, quote=True)}" src="data:image/png;base64,{data}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str | float | int]]) -> str:
    """Lay out a table; numbers stand right.

    Parameters
    ----------
    head : sequence of str
        Headings.
    rows : sequence of sequence
        Text is escaped; floats are written with three significant digits.

    Returns
    -------
    str
        HTML.
    """

    def cell(value: str | float | int) -> str:
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        text = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        return f'<td class="number">{text}</td>'

    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def picture_table(columns: Sequence[tuple[str, Sequence[Path]]], labels: Sequence[str]) -> str:
    """Lay out pictures: a row a trial, a column for what was seen and for each generator.

    Parameters
    ----------
    columns : sequence of (str, sequence of Path)
        Heading and pictures.
    labels : sequence of str
        What each trial is.

    Returns
    -------
    str
        HTML.
    """
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name, _ in columns)
    rows = []
    for index, label in enumerate(labels):
        cells = [
            f'<td class="{"" if "shuffled" in name else "own"}">{picture(paths[index], f"{name}, {label}")}</td>'
            for name, paths in columns
        ]
        rows.append(f"<tr><td>{escape(label)}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table class="pictures"><tr>{head}</tr>{"".join(rows)}</table></div>'


def page(title: str, body: str) -> str:
    """Wrap a body.

    Parameters
    ----------
    title : str
        The page's.
    body : str
        HTML.

    Returns
    -------
    str
        The whole document.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
