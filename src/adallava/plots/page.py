"""A reproduction as files: tables as Markdown, CSV and LaTeX, figures as PNG and SVG, and all of it as one page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from adallava.plots.items import Item
from adallava.plots.tables import Table

_DPI = 150
_STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 1.5rem; color: #1d2433; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { max-width: 48rem; margin: .3rem 0 .8rem; } nav a { margin-right: .8rem; }
table { border-collapse: collapse; margin: .4rem 0 1rem; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .6rem; text-align: right; border-bottom: 1px solid #e4e8ef; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text + td.text { white-space: normal; }
th { border-bottom: 1.5px solid #1d2433; vertical-align: bottom; white-space: normal; }
.scroll { overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
footer { margin-top: 2.5rem; color: #5a6475; font-size: 13px; }
"""


def write_items(items: Sequence[Item], folder: Path, title: str, facts: Sequence[tuple[str, str]]) -> Path:
    """Write every table and figure into ``folder`` and return the page, ``index.html``; files there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        for number, table in enumerate(item.tables):
            name = item.name if number == 0 else f"{item.name}-{number + 1}"
            for ending, text in (("md", table.to_markdown()), ("csv", table.to_csv()), ("tex", table.to_latex())):
                (folder / f"{name}.{ending}").write_text(text, encoding="utf-8")
        for name, figure in item.figures.items():
            save_figure(figure, folder / f"{item.name}-{name}")
    page = folder / "index.html"
    page.write_text(to_html(items, title, facts), encoding="utf-8")
    return page


def save_figure(figure: Figure, stem: Path) -> None:
    """Write ``stem``.png and ``stem``.svg; the same rows give the same files, so there is no date in them."""
    figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=_DPI)
    figure.savefig(stem.with_name(f"{stem.name}.svg"), metadata={"Date": None})


def to_html(items: Sequence[Item], title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The page: everything is inside it and nothing is fetched."""
    links = "".join(f'<a href="#{item.name}">{escape(item.title.partition(":")[0])}</a>' for item in items)
    foot = ", ".join(f"{escape(name)} {escape(value)}" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{''.join(map(_section, items))}"
        f"<footer>{foot}</footer>\n</body></html>\n"
    )


def _section(item: Item) -> str:
    tables = "".join(f'<div class="scroll">{_table(table)}</div>' for table in item.tables)
    pictures = "".join(
        f'<img alt="{escape(item.title)}, {escape(name)}" src="data:image/png;base64,{_png(figure)}">\n'
        for name, figure in item.figures.items()
    )
    head = f'<section id="{item.name}"><h2>{escape(item.title)}</h2>\n<p>{escape(item.text)}</p>\n'
    return f"{head}{tables}{pictures}</section>\n"


def _table(table: Table) -> str:
    def cell(text: str) -> str:
        is_text = any(sign.isalpha() for sign in text)
        return f'<td class="text">{escape(text)}</td>' if is_text else f"<td>{escape(text)}</td>"

    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    return base64.b64encode(data.getvalue()).decode("ascii")
