"""``adallava bench``: run a benchmark, show its rows, keep them in a file, draw them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adallava.bench import BENCHMARKS, BenchSettings
from adallava.errors import ConfigError
from adallava.results import ResultRow, read_rows, write_json

_FILE_WIDTH = 120


@dataclass(frozen=True)
class BenchFiles:
    """Files of a benchmark: rows to read instead of measuring, a file for new ones, a folder for figures."""

    rows: Path | None = None
    out: Path | None = None
    figures: Path | None = None


def bench(name: str, settings: BenchSettings, files: BenchFiles, as_json: bool) -> None:
    """Run benchmark ``name`` and print its rows; see ``adallava bench --help``."""
    measure = BENCHMARKS.get(name)
    if files.out is not None and files.out.exists():
        write_json(files.out, [])  # says that result files are kept, before anything is measured
    rows = measure(settings) if files.rows is None else _read(files.rows, name)
    if files.out is not None:
        write_json(files.out, rows)
    if files.figures is not None:
        draw(rows, files.figures)
    if as_json:
        told = [{**row.config, **row.metrics} for row in rows]
        print(json.dumps({"benchmark": name, "rows": told, "provenance": rows[0].provenance}))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        console.print(table(rows))


def _read(path: Path, name: str) -> list[ResultRow]:
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as result rows: {error}") from error
    if not rows or {row.name for row in rows} != {name}:
        raise ConfigError(f"{path} has no rows of {name}, or others too. Name the benchmark that wrote it.")
    return rows


def draw(rows: list[ResultRow], folder: Path) -> None:
    """Write each figure of the rows as PNG and SVG into ``folder``; files there are replaced."""
    from adallava.plots.page import save_figure
    from adallava.plots.timing import figures_of

    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures_of(rows).items():
        save_figure(figure, folder / name)


def table(rows: list[ResultRow]) -> Table:
    """One line per row: what varies of its config, and its numbers; lists of single measurements are left out."""
    keys = dict.fromkeys(key for row in rows for key in row.config)
    varying = [key for key in keys if len({str(row.config.get(key, "")) for row in rows}) > 1]
    metrics = [item for row in rows for item in row.metrics.items()]
    numbers = list(dict.fromkeys(key for key, value in metrics if isinstance(value, int | float)))
    made = Table(box=None, header_style="dim", pad_edge=False)
    for key in (*varying, *numbers):
        made.add_column(key.replace("_", " "), justify="left" if key in varying else "right", no_wrap=key in varying)
    for row in rows:
        told = ("" if key not in row.metrics else _number(row.metrics[key]) for key in numbers)
        made.add_row(*(str(row.config.get(key, "")) for key in varying), *told)
    return made


def _number(value: float | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
