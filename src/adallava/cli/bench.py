"""``adallava bench``: run a benchmark, show its rows, keep them in a file."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adallava.bench import BENCHMARKS, BenchSettings
from adallava.results import ResultRow, write_json

_FILE_WIDTH = 120


def bench(name: str, settings: BenchSettings, out: Path | None, as_json: bool) -> None:
    """Run benchmark ``name`` and print its rows; see ``adallava bench --help``."""
    measure = BENCHMARKS.get(name)
    if out is not None and out.exists():
        write_json(out, [])  # says that result files are kept, before anything is measured
    rows = measure(settings)
    if out is not None:
        write_json(out, rows)
    if as_json:
        told = [{**row.config, **row.metrics} for row in rows]
        print(json.dumps({"benchmark": name, "rows": told, "provenance": rows[0].provenance}))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        console.print(table(rows))


def table(rows: list[ResultRow]) -> Table:
    """One line per row: what varies of its config, and its numbers; lists of single measurements are left out."""
    varying = [key for key in rows[0].config if len({str(row.config[key]) for row in rows}) > 1]
    metrics = [item for row in rows for item in row.metrics.items()]
    numbers = list(dict.fromkeys(key for key, value in metrics if isinstance(value, int | float)))
    made = Table(box=None, header_style="dim", pad_edge=False)
    for key in (*varying, *numbers):
        made.add_column(key.replace("_", " "), justify="left" if key in varying else "right", no_wrap=key in varying)
    for row in rows:
        told = ("" if key not in row.metrics else _number(row.metrics[key]) for key in numbers)
        made.add_row(*(str(row.config[key]) for key in varying), *told)
    return made


def _number(value: float | None) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value) if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"
