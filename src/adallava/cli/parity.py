"""``adallava parity``: replay recordings of the released code and print one row per quantity."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adallava.parity.replay import find_recordings
from adallava.parity.tally import Quantity, all_ok

_FILE_WIDTH = 120


def parity(root: Path, as_json: bool) -> None:
    """Replay every recording under ``root``; exits with status 1 if a difference is past its tolerance."""
    rows: list[Quantity] = []
    progress = Console(stderr=True, highlight=False)
    for subject, name, replay in find_recordings(root):
        with progress.status(f"replaying {name}"):
            rows += replay(subject, name)
    if as_json:
        print(json.dumps([_plain(row) for row in rows], indent=2, allow_nan=False))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _FILE_WIDTH
        console.print(_table(rows), "", _verdict(rows), sep="\n")
    if not all_ok(rows):
        raise typer.Exit(1)


def _plain(row: Quantity) -> dict[str, Any]:
    """A row for JSON, which knows no infinity: null stands for differing shapes, lists or NaN."""
    difference = row.difference if math.isfinite(row.difference) else None
    return {**dataclasses.asdict(row), "difference": difference, "ok": row.ok}


def _table(rows: Sequence[Quantity]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("recording", "quantity"):
        table.add_column(heading, no_wrap=True)
    for heading in ("compared", "largest difference", "tolerance", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        first = row.recording if row.recording != before else ""
        before = row.recording
        verdict = "[green]ok[/green]" if row.ok else f"[red]no[/red] {escape(row.worst)}"
        table.add_row(escape(first), escape(row.name), f"{row.count:,}", *_numbers(row), verdict)
    return table


def _numbers(row: Quantity) -> tuple[str, str]:
    if row.tolerance == 0:
        return ("identical" if row.ok else "differs"), "identical"
    return (f"{row.difference:.1e}" if math.isfinite(row.difference) else "differs"), f"{row.tolerance:.0e}"


def _verdict(rows: Sequence[Quantity]) -> str:
    wrong = sum(not row.ok for row in rows)
    recordings = len({row.recording for row in rows})
    if wrong:
        return f"[red]{wrong} of {len(rows)} quantities in {recordings} recordings are past their tolerance.[/red]"
    return f"[green]All {len(rows)} quantities in {recordings} recordings are within their tolerance.[/green]"
