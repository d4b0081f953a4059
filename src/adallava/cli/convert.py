"""``adallava convert``: released checkpoints into this project's format, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from adallava.hosts.convert import Report
from adallava.hosts.convert import convert as run
from adallava.hosts.load import resolve


def convert(source: str, destination: Path, to: str, vision_tower: str | None, as_json: bool) -> None:
    """Convert ``source`` into the folder ``destination`` and print what was done; see ``adallava convert --help``."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report = run(resolve(source), destination, to=to, vision_tower=vision_tower, progress=progress)
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _show(report)


def _show(report: Report) -> None:
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    files = "1 file" if report.shards == 1 else f"{report.shards} files"
    table.add_row("from", f"{report.source} ({report.source_format})")
    table.add_row("to", f"{report.destination} ({report.format})")
    table.add_row("weights", f"{report.tensors} tensors, {report.nbytes / 1e6:,.1f} MB in {files}")
    if report.token_selection not in (None, "none"):
        table.add_row("selection", f"{report.token_selection}, kept in the config")
    for note in report.notes:
        table.add_row("note", note)
    console.print(table)
